"""`eval.mcp` beside the official client, over stdin and stdout."""

import asyncio
import sys

import pytest

from tests.commands import ROOT

pytest.importorskip("mcp", reason="the extra mcp is not installed")
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client


async def talk(workdir, *arguments: str):
    """Tools, what search finds, what a wrong call says; with --write a document comes and goes."""
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "eval.mcp", f"--workdir={workdir}", *arguments],
        cwd=str(ROOT),
    )
    async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
        await session.initialize()
        names = [tool.name for tool in (await session.list_tools()).tools]
        found = await session.call_tool("search", {"query": "scale the gradient", "k": 2})
        wrong = await session.call_tool("search", {"query": " "})
        said = []
        if "add_document" in names:
            new = {"id": "new", "text": "A text about pelicans."}
            said.append(await session.call_tool("add_document", new))
            query = {"query": new["text"], "k": 1, "expand": False}
            said.append(await session.call_tool("search", query))
            said.append(await session.call_tool("remove_document", {"id": "new"}))
    return names, found, wrong, said


@pytest.mark.slow
def test_an_agent_searches_and_no_more(smoke):
    names, found, wrong, _ = asyncio.run(talk(smoke[0]))
    assert names == ["search"]
    assert len(found.structured_content["results"]) == 2
    assert len(found.structured_content["expansion"]) == 1
    assert wrong.is_error


@pytest.mark.slow
def test_an_agent_that_may_write_adds_and_removes(smoke, tmp_path):
    names, _, _, said = asyncio.run(talk(smoke[0], "--write", f"--state={tmp_path}"))
    assert names == ["search", "add_document", "remove_document"]
    added, searched, removed = said
    assert added.content[0].text == "added"
    assert searched.structured_content["results"][0]["id"] == "new"
    assert removed.content[0].text == "removed"
