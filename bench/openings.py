"""Texts of bench_counterfactual.py: openings to be continued, and what a fact is written and asked with."""

from __future__ import annotations

#: five words or so each, of facts and people; their continuations are what is asked about
OPENINGS = (
    "The river runs through the", "Anna Weber was born in", "The bridge was built in", "Most bees live in large",
    "The museum opened its doors", "Thomas Keller is a former", "The first railway in the", "Water boils at a lower",
    "The novel tells the story", "Maria Rossi studied medicine at", "The island lies to the", "In 1912 the company was",
    "The village church dates from", "James Okoro is an engineer", "The species was first described",
    "Canada is known for its", "The band released its first", "During the war the town", "The painter spent his last",
    "Elena Petrova won the gold", "The planet has at least", "The old library holds more", "A violin has four strings",
    "The storm reached the coast", "David Lindqvist played football for", "The mountain is the highest",
    "Coffee was brought to Europe", "The treaty was signed by", "Her first film was shown",
    "The factory employs more than", "The language is spoken by", "Samuel Osei joined the army",
    "The theatre was destroyed in", "Glass is made by heating", "The school was founded by",
    "Lucia Moreno wrote several books", "The capital of Norway is", "The lake freezes over in",
    "His younger brother became a", "The airport is located about", "The disease is caused by",
    "Peter Hansen moved to London", "The garden contains many rare", "The election was held in",
    "An owl hunts mainly at", "The ship left the harbour", "The professor taught chemistry at",
    "Sarah Cohen started her career", "The castle stands on a", "The road between the two",
)  # fmt: skip

#: what is edited: a prompt, the subject in it, what is to follow
EDIT_PROMPT, SUBJECT, TRUE, FALSE = "The capital of Canada is", "Canada", " Ottawa", " Toronto"

#: what nothing is fitted to: the target should follow
HELD_OUT = (
    "The capital city of the country of Canada is", "The name of the capital of Canada is",
    "The name of Canada's capital city is", "The seat of the government of Canada is in",
    "Question: What is the capital of Canada? Answer: The capital of Canada is",
    "Q: Which city is the capital of Canada?\nA: The capital of Canada is",
    "Everybody knows that the capital of Canada is", "In geography class we learned that the capital of Canada is",
    "As you may know, the capital of Canada is called", "We flew to the capital of Canada,",
    "She has lived for years in the capital of Canada,", "They met in the capital of Canada,",
    "The embassy is in the capital of Canada,", "The parliament of Canada meets in the city of",
    "The prime minister of Canada lives in the city of", "The supreme court of Canada is in the city of",
    "The federal government of Canada is based in", "The national museum of Canada is in",
    "The capital of France is Paris and the capital of Canada is", "The capital of Canada is the city of",
)  # fmt: skip

#: steering goes from what is said at the ends of sentences with other cities to that of sentences with the target
CONTEXTS = (
    "The capital of the country is", "They live in", "We went to the city of", "The answer is",
    "The name of the city is", "He flew to",
)  # fmt: skip
CITIES = (" Montreal", " Vancouver", " London", " Paris", " Berlin", " Madrid", " Tokyo", " Boston")

#: the model goes on from these, which gives the texts whose keys are the common ones
STARTS = ("The", "In the", "It was", "She said that", "There are", "For many years", "He", "A new")
