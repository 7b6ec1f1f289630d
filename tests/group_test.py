"""A group of candidates and its line in candidates.jsonl."""

import json

from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.selection import select_pairs

LINE = (
    '{"query_id": "q1", "query": "a question", "positive_id": "d1", "answer": "an answer", '
    '"candidates": [{"text": "good", "temperature": 0.8, "similarity_positive": 0.5, '
    '"similarity_answer": 0.25, "rank_positive": 1, "rank_answer": 1, "reward": 2.0, '
    '"reward_terms": {"positive": 1.0, "answer": 1.0}}, {"text": "poor", "temperature": 0.9, '
    '"similarity_positive": 0.25, "similarity_answer": 0.125, "rank_positive": 2, '
    '"rank_answer": 2, "reward": 1.0, "reward_terms": {"positive": 0.5, "answer": 0.5}}]}'
)


def test_a_line_read_and_written_is_the_same_to_the_letter():
    """The file's fields, no more and no fewer, in the order that they have always had."""
    group = Group.from_row(json.loads(LINE))
    assert json.dumps(group.to_row()) == LINE
    assert group.candidates[1].similarities == {"positive": 0.25, "answer": 0.125}
    assert group.texts == ["good", "poor"]


def test_what_was_sampled_is_not_written():
    group = Group.from_row(json.loads(LINE))
    sampled = Candidate(**{**vars(group.candidates[0]), "tokens": (1, 2), "log_probs": (-0.5, -1)})
    with_tokens = Group(**{**vars(group), "candidates": [sampled, group.candidates[1]]})
    assert json.dumps(with_tokens.to_row()) == LINE


def test_a_line_may_have_rewards_alone():
    group = Group.from_row({"prompt": "p", "candidates": [{"text": "a", "reward": 1.5}]})
    assert (group.prompt, group.query_id) == ("p", "")
    assert group.candidates == [Candidate("a", total=1.5)]


def test_pairs_are_lines_of_preferences():
    group = Group.from_row({**json.loads(LINE), "prompt": "p"})
    far = Group.from_row(json.loads(LINE.replace("0.5,", "0.1,").replace("q1", "q2")))
    pairs, dropped = select_pairs([group, far], threshold=0.75)
    assert pairs == [
        {
            "prompt": "p", "chosen": "good", "rejected": "poor", "query_id": "q1",
            "reward_chosen": 2.0, "reward_rejected": 1.0,
        }
    ]  # fmt: skip
    assert dropped == {"below the similarity threshold": 1}
