"""The ops inside other libraries. Importing a module registers them there."""
