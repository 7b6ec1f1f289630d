"""The generator's prompts, and how its answers are cleaned.

A prompt is a template: data, chosen by name. `{query}` is the query, `{document}` a related
document, `{passages}` retrieved passages, numbered, and `{documents}` the same with an empty line
between them. Other placeholders are what a strategy shows of the text written before. Where a
method's authors have a system's message, it stands before the user's, in one message: some models
have no other.
"""

import dataclasses
import json
import re
import string
from collections.abc import Sequence

from expandr_jax.errors import UserError
from expandr_jax.expansion.patterns import PATTERNS_JSON


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The template of a message to the generator.

    Attributes:
        template: The user's message, with placeholders.
        source: Where it comes from.
    """

    template: str
    source: str

    @property
    def fields(self) -> set[str]:
        """The placeholders of the template."""
        return {
            name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None
        }

    @property
    def shows_passages(self) -> bool:
        """Whether the template shows passages."""
        return not self.fields.isdisjoint(("passages", "documents"))

    @property
    def of_query_alone(self) -> bool:
        """Whether the template shows nothing but the query."""
        return self.fields <= {"query"}

    def message(
        self,
        query: str = "",
        document: str | None = None,
        passages: Sequence[str] = (),
        **written: str,
    ) -> str:
        """The user's message; ValueError where the template wants what is not given."""
        numbered = "\n".join(f"{i}. {passage}" for i, passage in enumerate(passages, start=1))
        values = {
            "query": query, "document": document, "passages": numbered or None,
            "documents": "\n\n".join(passages) or None, **written,
        }  # fmt: skip
        missing = [field for field in sorted(self.fields) if values.get(field) is None]
        if missing:
            raise ValueError(f"the prompt {self.template!r} needs {missing}")
        # One pass, so that braces inside a query or document stay what they are.
        return self.template.format(**values)


def _hyde(request: str, label: str) -> Prompt:
    return Prompt(f"{request}\n{label}: {{query}}\nPassage:", "HyDE, arXiv 2212.10496")


def _instructed(system: str, user: str, source: str) -> Prompt:
    """A prompt of what the system says and what the user says."""
    return Prompt(f"{system}\n\n{user}", source)


_FIGRET = "FiGRet's three aims, arXiv 2411.03957, in words of our own"
_KEYWORDS_ALONE = "You output only comma-separated keywords. No sentences."
_RELEVANT = (  # CSQE's, of its example and of the query.
    "You will begin by examining the initially retrieved documents and identifying the ones that "
    "are relevant, even partially, to the query. Once the relevant documents are identified, you "
    "will extract the key sentences from each document that contribute to their relevance."
)
GENQR_ENSEMBLE = {  # Ten ways to ask for the same, each of which is asked once.
    f"genqr-ensemble-{number}": _instructed(
        _KEYWORDS_ALONE, f'{request}:\n"{{query}}"', "GenQREnsemble, arXiv 2404.03746"
    )
    for number, request in enumerate((
        "Improve the search effectiveness by suggesting expansion terms for the query",
        "Recommend expansion terms for the query to improve search results",
        "Improve the search effectiveness by suggesting useful expansion terms for the query",
        "Maximize search utility by suggesting relevant expansion phrases for the query",
        "Enhance search efficiency by proposing valuable terms to expand the query",
        "Elevate search performance by recommending relevant expansion phrases for the query",
        "Boost the search accuracy by providing helpful expansion terms to enrich the query",
        "Increase the search efficacy by offering beneficial expansion keywords for the query",
        "Optimize search results by suggesting meaningful expansion terms to enhance the query",
        "Enhance search outcomes by recommending beneficial expansion terms to supplement the "
        "query",
    ), start=1)
}  # fmt: skip
PROMPTS = {
    "q2d": Prompt(
        "Please write a passage to answer the question.\nQuestion: {query}\nPassage:",
        "ExpandR, arXiv 2502.17057",
    ),
    "q2a": Prompt(
        "You are given a query and a related document. Based on the query, generate a direct and "
        "relevant answer using the information in the document. If the query is a statement, "
        "expand on it. If it is a question, provide a direct answer. Avoid any extra description "
        "or irrelevant content.\nQuery: {query}\nRelated Document: {document}\nAnswer:",
        "ExpandR's self-answer, arXiv 2502.17057",
    ),
    "pydoc": Prompt(
        "Write the documentation of the Python function described as: {query}\nDocumentation:",
        "for docstrings: asks for the kind of document that is searched",
    ),
    "q2q": Prompt(
        "Output the rewrite of input query.\nQuery: {query}\nOutput:", "query rewriting"
    ),
    "rewrite": Prompt(
        "Rewrite the question as a query for a search engine, in the words that a page with the "
        "answer would use.\nQuestion: {query}\nSearch query:",
        "Rewrite-Retrieve-Read, arXiv 2305.14283, in words of our own",
    ),
    "q2e": Prompt(
        "Write a list of keywords for the given query:\nQuery: {query}\nKeywords:",
        "Jagerman et al., arXiv 2305.03653",
    ),
    "q2c": Prompt(
        "Answer the following query:\n\n{query}\n\nGive the rationale before answering",
        "Jagerman et al., arXiv 2305.03653",
    ),
    "hyde": _hyde("Please write a passage to answer the question.", "Question"),
    "hyde-claim": _hyde("Please write a scientific paper passage to support/refute the claim.",
                        "Claim"),
    "hyde-argument": _hyde("Please write a counter argument for the passage.", "Passage"),
    "hyde-scientific": _hyde("Please write a scientific paper passage to answer the question.",
                             "Question"),
    "hyde-finance": _hyde("Please write a financial article passage to answer the question.",
                          "Question"),
    "hyde-news": _hyde("Please write a news passage about the topic.", "Topic"),
    "query2doc": Prompt(
        "Write a passage that answers the given query:\n\n"
        "Query: what state is this zip code 85282\n"
        "Passage: 85282 is a zip code of Tempe, a city in Maricopa County in the state of Arizona. "
        "It lies in the south of the city.\n\n"
        "Query: how long do hard boiled eggs keep\n"
        "Passage: Hard boiled eggs keep for about one week in a refrigerator, peeled or not. At "
        "room temperature they should be eaten within two hours.\n\n"
        "Query: why did the us enter the first world war\n"
        "Passage: The United States entered the First World War in April 1917, after German "
        "submarines had sunk American ships and a telegram had offered Mexico an alliance.\n\n"
        "Query: definition of a prime number\n"
        "Passage: A prime number is a whole number greater than one that only one and itself "
        "divide without remainder, such as 2, 3, 5 and 7.\n\n"
        "Query: {query}\nPassage:",
        "query2doc, arXiv 2303.07678, with examples of our own",
    ),
    "mugi": _instructed(
        "You are PassageGenGPT, an AI capable of generating concise, informative, and clear pseudo "
        "passages on specific topics.",
        "Generate one passage that is relevant to the following query: '{query}'. The passage "
        "should be concise, informative, and clear",
        "MuGI, arXiv 2401.06311",
    ),
    "lamer": Prompt(
        "Give a question \"{query}\" and its possible answering passages (most of these passages "
        "are wrong) enumerated as:\n{passages}\nplease write a correct answering passage.",
        "LameR, arXiv 2304.14233",
    ),
    "thinkqe": Prompt(
        "Given a question \"{query}\" and its possible answering passages (most of these passages "
        "are wrong) enumerated as:\n{passages}\n\nplease write a correct answering passage. Use "
        "your own knowledge, not just the example passages!",
        "ThinkQE, arXiv 2506.09260",
    ),
    "keqe": _instructed(
        "You are a helpful assistant.",
        "Please write a passage to answer the question\nQuestion: {query}\nPassage:",
        "CSQE's request without documents, arXiv 2402.18031",
    ),
    "csqe": _instructed(  # One worked example, then documents that were found.
        "You are an efficient search assistant. I will provide you with a query and its initially "
        "retrieved documents.\nYou will begin by examining the initially retrieved documents and "
        "identifying the ones that are relevant, even partially, to the query.\nOnce the relevant "
        "documents are identified, you will extract the key sentences from each document that "
        "contribute to their relevance.",
        'Query: "how do bees make honey"\n'
        "Retrieved documents:\n"
        "1. Bees live in colonies. In the hive they pass nectar from mouth to mouth until most of "
        "its water is gone.\n"
        f"2. Honey has been eaten for thousands of years.\n\n{_RELEVANT}\n\n"
        "Document 1:\n"
        '"In the hive they pass nectar from mouth to mouth until most of its water is gone."\n\n'
        f'Query: "{{query}}"\nRetrieved documents:\n{{passages}}\n\n{_RELEVANT}',
        "CSQE, arXiv 2402.18031, with an example of our own",
    ),
    "figret-easier": Prompt(
        "Write a short passage that answers the query plainly and in its own words, by what the "
        "document says.\nQuery: {query}\nDocument: {document}\nPassage:",
        _FIGRET,
    ),
    "figret-half": Prompt(
        "Write a short passage that answers one half of the query by what the document says, and "
        "nothing of the other half.\nQuery: {query}\nDocument: {document}\nPassage:",
        _FIGRET,
    ),
    "figret-noise": Prompt(
        "Write a passage in which one sentence answers the query by what the document says, and "
        "all others are about something else.\nQuery: {query}\nDocument: {document}\nPassage:",
        _FIGRET,
    ),
    "genqr": _instructed(
        _KEYWORDS_ALONE,
        'Suggest keywords to improve retrieval for this query:\n"{query}"\nReturn only keywords.',
        "GenQR, arXiv 2308.00415",
    ),
    **GENQR_ENSEMBLE,
    "qa-expand-questions": _instructed(
        "You are a helpful assistant. Based on the following query, generate 3 possible related "
        "questions that someone might ask.",
        'Break the query into sub-questions: "{query}"',
        "QA-Expand, arXiv 2502.08557",
    ),
    "qa-expand-answers": _instructed(
        "You are a knowledgeable assistant. The user provides 3 questions in JSON format. For each "
        "question, produce a document style answer. Each answer must: Be informative regarding the "
        "question. Return all answers in JSON format with the keys answer1, answer2, and answer3. "
        'For example: {{"answer1": "...", "answer2": "...", "answer3": "..."}}',
        'Questions to answer: "{questions}"',
        "QA-Expand, arXiv 2502.08557",
    ),
    "qa-expand": _instructed(
        "You are an evaluation assistant. You have an initial query and answers provided in JSON "
        "format. Your role is to check how relevant and correct each answer is. Return only those "
        "answers that are relevant and correct to the initial query. Omit or leave blank any that "
        "are incorrect, irrelevant, or too vague. If needed, please rewrite the answer in a better "
        'way. Return your result in JSON with the same structure: {{"answer1": "Relevant/correct'
        '...", "answer2": "Relevant/correct...", "answer3": "Relevant/correct..."}} If an answer '
        "is irrelevant, do not include it at all or leave it empty. Focus on ensuring the final "
        "JSON only contains the best content for retrieval.",
        'Initial query: "{query}"\nAnswers: "{answers}"',
        "QA-Expand, arXiv 2502.08557",
    ),
    "reformer-pattern": _instructed(
        "You are an expert in query reformulation. Select the most appropriate pattern based on "
        "the query and document context.",
        "Given the following query and retrieved documents, select the most appropriate "
        "reformulation pattern.\n\nQuery: {query}\n\nRetrieved Documents:\n{documents}\n\n"
        "Available Patterns:\n"
        + PATTERNS_JSON.replace("{", "{{").replace("}", "}}")
        + "\n\nSelect the pattern that best fits the query and document context. Return only the "
        "JSON of the selected pattern.",
        "ReFormeR, arXiv 2604.01417, with examples of our own",
    ),
    "reformer": _instructed(
        "You are an expert in query reformulation. Apply the transformation rule to create a "
        "better query.",
        "Apply the following transformation rule to the query:\n\nQuery: {query}\n"
        "Transformation Rule: {rule}\n\nExamples of this pattern:\n{examples}\n\n"
        "Return only the reformulated query.",
        "ReFormeR, arXiv 2604.01417, with examples of our own",
    ),
}  # fmt: skip
DOCUMENT_PROMPTS = {  # What is asked of a document when it is indexed.
    "d2q": Prompt(
        "Write questions that the following document answers.\nDocument: {document}\nQuestions:",
        "document expansion by the questions it answers, in words of our own",
    ),
    "d2e": Prompt(
        "Write a list of keywords by which the following document should be found:\n"
        "Document: {document}\nKeywords:",
        "q2e's counterpart, for documents; words of our own",
    ),
    "d2d": Prompt(
        "Write a passage that says in other words what the following document is about.\n"
        "Document: {document}\nPassage:",
        "q2d's counterpart, for queries and documents expanded by one model; words of our own",
    ),
}

_KINDS = (
    r"(?:passage|answer|response|document(?:ation)?|docstring|paragraph|article|abstract|summary|"
    r"explanation|rationale|description|keywords?|rewrite|(?:rewritten|search) query|"
    r"counter[- ]?argument|output)"
)
# What models say before the text itself. Each is tried once, in this order, at the beginning.
LEAD_INS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?s:.*)</think>\s*",  # A reasoning model's thoughts.
        r"<think>(?s:.*)",  # A thought that the longest text has cut off: there is no answer.
        r"(?:sure(?: thing)?|certainly|of course|absolutely)"
        r"(?:!|[.,:](?=\s+(?:here|i'd|i would|below|the following)\b))\s*",
        rf"i(?:'d| would) be (?:happy|glad) to [^\n.!:]*[.!:]\s+(?=here\b|\**{_KINDS}\b)",
        r"here(?:'s|’s| is| are) [^\n:.]{1,200}:\s*",
        rf"(?:below|the following)(?: is| are)? [^\n:.]*\b{_KINDS}\b[^\n:.]*:\s*",
        r"the (?:passage|documentation|answer)\b[^\n:.]{0,80}:\s*",
        rf"\**{_KINDS}\s*:\**\s*",
    )
)
# A JSON object of questions or answers, which may be cut anywhere, and the texts in it.
_OBJECT = re.compile(r'(?:```(?:json)?\s*)?\{\s*"(?:question|answer)\d*"\s*:')
_VALUE = re.compile(r'"(?:question|answer)\d*"\s*:\s*("(?:[^"\\]|\\.)*)', re.DOTALL)
REPEATED_SHARE = 0.5  # A text more of whose word 4-grams stand twice is repetitive.


def custom_prompt(template: str) -> Prompt:
    """The prompt of a config's template, which shows {query} and, where it is to, {passages}.

    Raises:
        UserError: It has no {query}, or another placeholder than these.
    """
    prompt = Prompt(template, "a config")
    try:
        shows = prompt.fields
        template.format(**dict.fromkeys(shows, ""))
    except (ValueError, LookupError):
        shows = set()
    if "query" not in shows or shows - {"query", "passages"}:
        raise UserError(
            f"expansion.template is {template!r}; expected a template that shows {{query}} and, at "
            "most, {passages}, with {{ for a brace"
        )
    return prompt


def strip_lead_in(text: str) -> str:
    """Takes what a model says before the text proper off it, as "Sure! Here is a passage ...:".

    What is left of a JSON object of answers are these, a line each.
    """
    text = text.strip()
    for pattern in LEAD_INS:
        if found := pattern.match(text):
            text = text[found.end() :]
    if not _OBJECT.match(text):
        return text
    values = (" ".join(_unquoted(value).split()) for value in _VALUE.findall(text))
    return "\n".join(value for value in values if value)


def _unquoted(value: str) -> str:
    """A string of JSON, whose closing quote is not there."""
    try:
        return json.loads(value + '"', strict=False)
    except ValueError:  # An escape that is none.
        return value[1:]


def is_repetitive(text: str) -> bool:
    """Whether more than half of a text's word 4-grams stand in it more than once."""
    words = text.lower().split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(grams) < 4:
        return False
    return 1 - len(set(grams)) / len(grams) > REPEATED_SHARE
