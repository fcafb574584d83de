"""lm-evaluation-harness on a server: `use_lm_eval.py URL MODEL TOKENIZER DIRECTORY`, with tasks of
the directory; results as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL, TOKENIZER, DIRECTORY = sys.argv[1:]
QUESTIONS = [
    {"question": "the quick brown", "choices": ["fox", "lazy dog"], "answer": 0},
    {"question": "the lazy", "choices": ["jumps over", "dog"], "answer": 1},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def main() -> None:
    directory = Path(DIRECTORY)
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, rest in (("tiny_choice", CHOICE), ("tiny_generate", GENERATE)):
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{URL}/v1/completions",
            "tokenizer": TOKENIZER,
            "num_concurrent": 2,
        },
        tasks=["tiny_choice", "tiny_generate"],
        task_manager=TaskManager(include_path=DIRECTORY, include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    told: dict[str, Any] = {"scores": [], "answers": []}
    for sample in sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"]):
        for arguments, responses in zip(sample["arguments"], sample["resps"], strict=True):
            (score, greedy), *_ = responses
            told["scores"].append([*arguments, score, greedy])
    for sample in sorted(found["samples"]["tiny_generate"], key=lambda sample: sample["doc_id"]):
        told["answers"].append([sample["arguments"][0][0], sample["resps"][0][0]])
    print(json.dumps(told))


main()
