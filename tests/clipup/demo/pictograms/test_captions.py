import pytest

from clipup.demo.pictograms.captions import other_names, words


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (":face_with_tears_of_joy:", "face with tears of joy"),
        ("arrow-bend-up-left", "arrow bend up left"),
        (":eight_o’clock:", "eight oclock"),
        (":piñata:", "pinata"),
        (":keycap_#:", "keycap number sign"),
        (":Heard_Island_&_McDonald_Islands:", "heard island and mcdonald islands"),
    ],
)
def test_names_of_packages_become_words(name, said):
    assert words(name) == said


@pytest.mark.parametrize(
    ("name", "aliases", "kept"),
    [
        ("cross mark", [":x:", ":cross_mark:"], []),
        ("one thirty", [":clock130:"], []),
        ("check mark button", [":white_check_mark:"], []),
        ("black cat", ["black_feline"], ["black feline"]),
        ("pile of poo", [":poop:", ":shit:", ":poop:"], ["poop"]),
    ],
)
def test_uninformative_aliases_are_not_captions(name, aliases, kept):
    assert other_names(name, aliases) == kept
