"""Regular expressions as deterministic automata over tokens. Imports numpy and the standard library only.

syntax     pattern → syntax tree; what is not supported is refused by its name
language   syntax tree → automaton over bytes of UTF-8
tokens     automaton over bytes, bytes of V tokens → automaton over tokens
child      all of it, as a process of its own that can be limited and killed
"""
