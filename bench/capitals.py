"""Facts of bench_alignment.py: countries whose names are one token of SmolLM2's, and their capitals."""

from __future__ import annotations

#: what is asked; and what names a country at the same position without asking for its capital
TEMPLATE, ELSEWHERE = "The capital of {} is the city of", "The language of {} is the language of"

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw", "Sweden": "Stockholm",
    "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Ireland": "Dublin", "England": "London",
    "Scotland": "Edinburgh", "Wales": "Cardiff", "Russia": "Moscow", "Ukraine": "Kyiv", "Turkey": "Ankara",
    "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut", "Israel": "Jerusalem",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Nigeria": "Abuja", "Ghana": "Accra", "Ethiopia": "Addis Ababa",
    "Morocco": "Rabat", "Japan": "Tokyo", "China": "Beijing", "Korea": "Seoul", "Vietnam": "Hanoi",
    "Thailand": "Bangkok", "Indonesia": "Jakarta", "Malaysia": "Kuala Lumpur", "Philippines": "Manila",
    "India": "Delhi", "Nepal": "Kathmandu", "Pakistan": "Islamabad", "Bangladesh": "Dhaka", "Afghanistan": "Kabul",
    "Australia": "Canberra", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia",
    "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota", "Venezuela": "Caracas",
    "Belgium": "Brussels", "Netherlands": "Amsterdam", "Switzerland": "Bern", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb", "Cyprus": "Nicosia", "Jordan": "Amman",
    "Libya": "Tripoli", "Algeria": "Algiers", "Sudan": "Khartoum", "Uganda": "Kampala", "Tanzania": "Dodoma",
    "Zimbabwe": "Harare", "Bolivia": "La Paz",
}  # fmt: skip
