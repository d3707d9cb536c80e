from small_icons import build, make_package, sets_of_package  # noqa: F401
from small_pictograms import read  # noqa: F401
