"""What is the same at many places is said once."""

from fullrank.verbs.joined_notes import joined_notes


def test_sentences_about_the_same_thing_at_many_places_become_one():
    notes = [f"attention in encoder.layer.{n}.attention.self was not read: two maps." for n in range(12)]
    assert joined_notes(["before", *notes, "after"]) == [
        "before",
        "attention in encoder.layer.0.attention.self … encoder.layer.11.attention.self (12 of these) was not read: "
        "two maps.",
        "after",
    ]


def test_what_differs_in_more_than_the_place_stays():
    notes = [
        "h.0 is 3 wide.",
        "h.1 is 4 wide.",
        "h.2 is 3 wide.",
        "from h.0 to h.1",
        "from h.1 to h.2",
        "from h.2 to h.3",
    ]
    assert joined_notes(notes) == notes


def test_two_are_named_and_none_is_said_twice():
    notes = ["h.0 was not read.", "h.1 was not read."]
    assert joined_notes([*notes, *notes]) == notes
