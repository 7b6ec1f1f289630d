"""ReFormeR's reformulation patterns: one is chosen for a query by its name, then applied.

Names, descriptions and rules are those that its prompts show (arXiv 2604.01417, as querygym has
them); the examples are our own.
"""

import json

PATTERNS = [
    {
        "pattern_name": name,
        "description": description,
        "transformation_rule": rule,
        "examples": examples,
    }
    for name, description, rule, *examples in (
        (
            "Semantic Clarification",
            "Clarifies ambiguous terms or actions to make the query more specific and "
            "understandable.",
            "Replace vague or ambiguous terms with more precise and contextually relevant terms.",
            ["jaguar speed", "how fast does a jaguar run"],
        ),
        (
            "Contextual Expansion",
            "Expands the query to include additional context or details that can help refine the "
            "search results.",
            "Add relevant contextual information to the original query to make it more specific.",
            ["growing tomatoes", "growing tomatoes in pots on a balcony"],
        ),
        (
            "Generalization",
            "Broadens the query to cover a wider range of related topics or scenarios.",
            "Replace specific terms with more general ones that encompass a broader category.",
            ["do herring gulls drink salt water", "can sea birds drink salt water"],
        ),
        (
            "Location Specification",
            "Clarifies the location or geographical context of the query.",
            "Specify the exact location or region to make the query more targeted.",
            ["when do swallows leave", "when do barn swallows leave northern Europe"],
        ),
        (
            "Purpose Specification",
            "Clarifies the purpose or intended use of a product, service, or concept.",
            "Specify the intended use or application to make the query more focused.",
            ["vinegar concentration", "vinegar concentration for removing limescale"],
        ),
        (
            "Temporal Adjustment",
            "Adjusts the temporal aspect of the query to reflect a more accurate or relevant time "
            "frame.",
            "Modify the time-related terms to better align with the user's intent.",
            ["when to plant garlic", "which month should garlic be planted in autumn"],
        ),
        (
            "Conceptual Shift",
            "Transforms the query by shifting the focus from one concept to a related but "
            "different concept.",
            "Replace the main subject or action with a closely related concept that better aligns "
            "with the user's intent.",
            ["why does bread go hard", "what is starch retrogradation in bread"],
        ),
        (
            "Clarify Intent",
            "Clarifies the underlying intent or goal of the query to make it more direct and "
            "actionable.",
            "Rephrase the query to directly address the user's intended action or information "
            "need.",
            ["bicycle chain noise?", "how do I stop a bicycle chain from squeaking"],
        ),
        (
            "Contextual Restriction",
            "Narrows down the context of the query to a more specific scenario or condition.",
            "Limit the scope of the query by adding constraints or conditions that refine the "
            "search results.",
            ["safe sleeping hours", "hours of sleep that a long-distance driver needs"],
        ),
        (
            "Clarify Subject",
            "Clarifies the main subject of the query to ensure it is accurately represented.",
            "Replace or refine the main subject to better reflect the user's intent.",
            ["who wrote the ninth", "who composed the Symphony No. 9 in D minor"],
        ),
    )
]
PATTERNS_JSON = json.dumps(PATTERNS, indent=2)


def chosen_pattern(text: str) -> dict[str, str]:
    """The rule and examples of the pattern whose name comes first in a text, else of the first."""
    places = [text.find(pattern["pattern_name"]) for pattern in PATTERNS]
    named = [(place, number) for number, place in enumerate(places) if place >= 0]
    pattern = PATTERNS[min(named)[1] if named else 0]
    return {
        "rule": pattern["transformation_rule"],
        "examples": json.dumps(pattern["examples"], indent=2),
    }
