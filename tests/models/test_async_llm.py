"""AsyncLLM end to end on SmolLM2: what comes out of a crowd is what each request comes to alone."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hexad import AsyncLLM, BeamSearchParams, RequestOutput, RequestOutputKind, SamplingParams
from hexad.errors import EngineError, ParamsError, PromptError
from hexad.outputs import BeamSearchOutput

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Q: Why is the sky blue?\nA:",
    "Ingredients: two eggs, flour,",
    "The year 1905 was",
)


GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(smollm2_path, max_num_seqs=8, max_model_len=512)
    yield llm
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        asyncio.run(whole(llm, "late", GREEDY))


async def whole(llm: AsyncLLM, prompt: str, params: SamplingParams) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params)][-1]


def params_of(number: int, kind: RequestOutputKind) -> SamplingParams:
    """Greedy and seeded, with logprobs and without."""
    return SamplingParams(
        temperature=0.9 * (number % 2),
        seed=number,
        max_tokens=20 + number,
        logprobs=number % 3 or None,
        n=1 + number % 2,
        output_kind=kind,
    )


def test_deltas_in_a_crowd_join_to_what_each_is_alone(llm: AsyncLLM) -> None:
    async def streamed(number: int) -> tuple[list[str], list[list[int]], list[float | None]]:
        params = params_of(number, RequestOutputKind.DELTA)
        texts = ["" for _ in range(params.n)]
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        cumulative: list[float | None] = [None] * params.n
        await asyncio.sleep(number / 50)
        async for output in llm.generate(PROMPTS[number % len(PROMPTS)], params):
            for completion in output.outputs:
                texts[completion.index] += completion.text
                tokens[completion.index] += completion.token_ids
                cumulative[completion.index] = completion.cumulative_logprob
        return texts, tokens, cumulative

    async def alone(number: int) -> tuple[list[str], list[list[int]], list[float | None]]:
        await llm.reset_prefix_cache()
        output = await whole(
            llm, PROMPTS[number % len(PROMPTS)], params_of(number, RequestOutputKind.FINAL_ONLY)
        )
        return (
            [completion.text for completion in output.outputs],
            [completion.token_ids for completion in output.outputs],
            [completion.cumulative_logprob for completion in output.outputs],
        )

    async def main() -> None:
        crowd = await asyncio.gather(*map(streamed, range(18)))
        assert crowd == [await alone(number) for number in range(18)]

    asyncio.run(main())


def test_leaving_a_stream_frees_its_blocks(llm: AsyncLLM) -> None:
    async def main() -> None:
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        async for output in llm.generate(PROMPTS[1], params, "left"):
            if len(output.outputs[0].token_ids) >= 3:
                break
        stream = await llm.submit(PROMPTS[2], params, "cancelled")
        await anext(stream)
        llm.cancel("cancelled")
        last = [output async for output in stream][-1]
        assert isinstance(last, RequestOutput)
        assert last.outputs[0].finish_reason == "abort"
        await llm.abort(["left", "cancelled", "nobody"])
        await llm.reset_prefix_cache()  # behind the cancels
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["hexad:kv_cache_usage_perc"].value == 0

    asyncio.run(main())


def test_chat_embeddings_and_beams(llm: AsyncLLM) -> None:
    async def main() -> None:
        chat = llm.chat([{"role": "user", "content": "What is 2 + 2? Only the number."}], GREEDY)
        near, far, same, answer, beams = await asyncio.gather(
            llm.embed("A cat sat on the mat."),
            llm.embed("Interest rates rose by half a per cent."),
            llm.embed("A cat sat on the mat."),
            last_of(chat),
            (await llm.submit(PROMPTS[0], BeamSearchParams(beam_width=2, max_tokens=4))).__anext__(),
        )
        assert answer.prompt is not None
        assert answer.prompt.startswith("<|im_start|>")
        assert "4" in answer.outputs[0].text
        assert near.outputs == same.outputs
        assert near.outputs != far.outputs
        assert math.isclose(math.hypot(*near.outputs.embedding), 1, rel_tol=1e-4)
        assert isinstance(beams, BeamSearchOutput)
        assert "Paris" in beams.sequences[0].text

    async def last_of(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
        return [output async for output in stream][-1]

    asyncio.run(main())


def test_refusals_reach_the_caller(llm: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(PromptError, match="a str, a list of int token ids or a dict"):
            await llm.submit(3.5)  # type: ignore[arg-type]
        with pytest.raises(PromptError, match="with a context of 512"):
            await whole(llm, "word " * 600, GREEDY)
        with pytest.raises(ParamsError, match="logit_bias"):
            await whole(llm, "a", SamplingParams(logit_bias={10**6: 1.0}))
        assert (await whole(llm, PROMPTS[0], GREEDY)).finished

    asyncio.run(main())


def test_sleep_gives_the_memory_back_and_wakes_the_same(llm: AsyncLLM) -> None:
    async def main() -> None:
        before = await whole(llm, PROMPTS[3], GREEDY)
        awake = resident()
        await llm.sleep()
        assert await llm.is_sleeping()
        assert awake - resident() > 50 * 2**20
        waiting = asyncio.create_task(whole(llm, PROMPTS[3], GREEDY))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await llm.wake_up()
        assert not await llm.is_sleeping()
        assert (await waiting).outputs == before.outputs

    def resident() -> int:
        """Bytes of this process in memory."""
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("there is no /proc to read the memory from")
    asyncio.run(main())


def test_exit_in_the_midst_of_a_step(smollm2_path: Path) -> None:
    code = f"""
import asyncio
from hexad import AsyncLLM, SamplingParams
llm = AsyncLLM({str(smollm2_path)!r}, max_model_len=512)
async def main():
    global stream
    stream = await llm.submit("Once", SamplingParams(max_tokens=400, ignore_eos=True))
    print(len((await anext(stream)).outputs[0].token_ids))
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_wrong_arguments_are_refused_and_disturb_nobody(llm: AsyncLLM) -> None:
    async def run() -> list[RequestOutput]:
        good = [asyncio.create_task(whole(llm, prompt, GREEDY)) for prompt in PROMPTS[:3]]
        for wrong in ({"priority": "x"}, {"request_id": 7}, {"sampling_params": {"temperature": 0}}):
            with pytest.raises(ParamsError):
                async for _ in llm.generate("hello", **wrong):
                    pass
        return await asyncio.gather(*good)

    assert [output.outputs[0].finish_reason for output in asyncio.run(run())] == ["length"] * 3
