from clipup.demo.comparison_tables import comparison_table


def rows(text, name):
    return [line.removeprefix(name).split() for line in text.splitlines() if line.startswith(f"{name}  ")]


def test_the_terminal_table_is_ascii_of_100_columns_with_every_number(make_report):
    text = comparison_table(make_report())
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert "gallery of 1,012 images and 3,988 captions, chance R@1 0.099 %" in text.splitlines()[0]
    assert "emoji, gallery 402" in text and "concepts, gallery 894" in text
    assert rows(text, "Chance") == [["0.099", "0.099"], ["0.25", "0.25", "0.11", "0.11"]]
    recalls, costs, _ = rows(text, "CLIP-UP")
    assert recalls == ["24.3", "46.2", "58.4", "24.6", "46.8", "59.1"]
    assert costs == ["400", "78", "1.772", "1.013", "0.0163"]
    assert rows(text, "CLIP-UP - dense continued")[0] == ["+1.2", "+2.3", "+3.0", "+0.7", "+1.3", "+1.7"]
    assert rows(text, "CLIP-UP / dense continued") == [["x1.00", "x1.34", "x2.10", "x1.20", "x1.32"]]
