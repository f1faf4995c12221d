"""Sums, to be chosen and to be written. From the root of the repository, where the paths begin:

opencompass examples/opencompass/toy.py
"""

from opencompass.datasets import JsonlDataset
from opencompass.openicl.icl_evaluator import AccEvaluator
from opencompass.openicl.icl_inferencer import GenInferencer, PPLInferencer
from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import ZeroRetriever

from minillada.measure.opencompass import Choices, MiniLLaDA

models = [
    dict(
        type=MiniLLaDA,
        abbr="minillada",
        path="runs/add-1",
        # Nothing is put between question and answer; what BOT says is predicted, or written.
        meta_template=dict(round=[dict(role="HUMAN"), dict(role="BOT", generate=True)]),
        mc_num=128,
        max_out_len=4,
        batch_size=40,
    )
]

# Multiple choice: which sum is likeliest, token for token?
choices = dict(
    type=Choices,
    abbr="toy_choices",
    path="examples/lm_eval/choices.jsonl",
    reader_cfg=dict(input_columns=["prompt"], output_column="answer"),
    infer_cfg=dict(
        prompt_template=dict(
            type=PromptTemplate,
            template={
                i: dict(round=[dict(role="HUMAN", prompt="{prompt}"), dict(role="BOT", prompt=f"{{option{i}}}")])
                for i in range(4)
            },
        ),
        retriever=dict(type=ZeroRetriever),
        inferencer=dict(type=PPLInferencer),
    ),
    eval_cfg=dict(evaluator=dict(type=AccEvaluator)),
)

# Generation: write the sum, and end the line.
sums = dict(
    type=JsonlDataset,
    abbr="toy_sums",
    path="examples/lm_eval/sums.jsonl",
    reader_cfg=dict(input_columns=["prompt"], output_column="answer"),
    infer_cfg=dict(
        prompt_template=dict(type=PromptTemplate, template=dict(round=[dict(role="HUMAN", prompt="{prompt}")])),
        retriever=dict(type=ZeroRetriever),
        inferencer=dict(type=GenInferencer, stopping_criteria=["\n"]),
    ),
    eval_cfg=dict(evaluator=dict(type=AccEvaluator)),
)

datasets = [choices, sums]
