"""Topics in the layouts of TREC's tracks, and mistakes in them."""

import random

import pytest

from expandr_jax.data.trec import read_topics
from expandr_jax.errors import UserError
from tests.beir_test import mutate, refusal

AD_HOC = """<top>
<num> Number: 301
<title> International Organized
   Crime
<desc> Description:
Identify organizations that participate in it.
<narr> Narrative: A relevant document names one.
</top>

<top>
<num> Number: 302 </num>
<title> Poliomyelitis &amp; Post-Polio </title>
<desc> Description: Is the disease under control? </desc>
</top>
"""
NUMBERED = """<topics task="covid">
  <topic number="301">
    <query>International Organized Crime</query>
    <question>who takes part</question>
  </topic>
  <topic number='302'><query>Poliomyelitis &amp; Post-Polio</query></topic>
</topics>
"""
LINES = "301\tInternational Organized Crime\r\n\n302\tPoliomyelitis & Post-Polio\n"
TOPICS = {"301": "International Organized Crime", "302": "Poliomyelitis & Post-Polio"}


def read(tmp_path, text):
    path = tmp_path / "topics.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_topics(path)


@pytest.mark.parametrize("text", [AD_HOC, NUMBERED, LINES, "\ufeff" + LINES, AD_HOC.upper()])
def test_all_layouts_hold_the_same_topics(tmp_path, text):
    found = read(tmp_path, text)
    same = {key: query.upper() for key, query in TOPICS.items()}
    assert found == (same if text.isupper() else TOPICS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (AD_HOC.replace("</top>", "", 1), ":1: the topic does not end before the next"),
        (AD_HOC.removesuffix("</top>\n"), ":10: the topic does not end"),
        (AD_HOC.replace("<num> Number: 302 </num>", ""), ":10: the topic has no <num>"),
        (AD_HOC.replace("302", "301"), ":10: topic '301' stands twice"),
        (AD_HOC.replace("302", "3 2"), ":10: topic id '3 2'; expected one without white space"),
        (AD_HOC.replace("title", "headline"), ":1: the topic has no <title> or <query>"),
        (LINES + "303\t \n", ":4: topic '303' has no text"),
        (LINES + "303 a query\n", ":4: no tab; expected id, tab, query"),
        (LINES.encode() + b"303\t\xff\n", ":4: not UTF-8"),
        ("\n", ": no topics"),
    ],
)
def test_mistakes_are_named(tmp_path, text, complaint):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert f"topics.txt{complaint}" in str(error.value)


@pytest.mark.parametrize("text", [AD_HOC, NUMBERED, LINES])
def test_200_mutations_end_in_one_line_or_topics(tmp_path, text):
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        (tmp_path / "topics.txt").write_bytes(mutate(text.encode(), rng))
        refused += bool(complaint := refusal(read_topics, tmp_path / "topics.txt"))
        assert "\n" not in complaint
        assert not complaint or "topics.txt" in complaint
    assert refused > 20
