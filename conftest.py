"""What the examples in docstrings may take for granted: the imports that any user has made."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pandas as pd
import pytest

import llmframe


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(
        asyncio=asyncio,
        pd=pd,
        openai=openai,
        llmframe=llmframe,
        df=pd.DataFrame({"text": ["Good morning", "Good night"]}),
    )
