from hypothesis import given
from hypothesis import strategies as st

from clipup.demo.pictograms.captions import other_names, words


def test_names_of_packages_become_words():
    assert words(":face_with_tears_of_joy:") == "face with tears of joy"
    assert words("arrow-bend-up-left") == "arrow bend up left"
    assert words(":AB_button_(blood_type):") == "ab button blood type"
    assert words(":eight_o’clock:") == "eight oclock"
    assert words(":piñata:") == "pinata"
    assert words(":keycap_#:") == "keycap number sign"
    assert words(":Heard_Island_&_McDonald_Islands:") == "heard island and mcdonald islands"


@given(st.text())
def test_words_are_lower_case_and_clean_for_any_input(text):
    cleaned = words(text)
    assert cleaned == words(cleaned)
    assert all(c.isascii() and (c.isalnum() or c == " ") for c in cleaned)
    assert cleaned == " ".join(cleaned.lower().split())


def test_uninformative_aliases_are_not_captions():
    assert other_names("cross mark", [":x:", ":cross_mark:"]) == []
    assert other_names("one thirty", [":clock130:"]) == []
    assert other_names("check mark button", [":white_check_mark:"]) == []
    assert other_names("black cat", ["black_feline"]) == ["black feline"]
    assert other_names("pile of poo", [":poop:", ":shit:", ":poop:"]) == ["poop"]
