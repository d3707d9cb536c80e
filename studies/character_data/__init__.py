"""The characters data set: Chinese characters in many typefaces, captioned with what they mean in English."""
