"""Prompt or fine-tune? Candidates of both kinds on the same held-out rows, with what each costs, and a decision.

price       what a request and a training cost, by the token, the hour or the measured second
asks        rows as questions with answers, under an instruction and after examples
examples    which training rows a prompt shows: at random, the most similar, of every label
race        the sequential paired test that stops measuring what has lost
learning    score over rows as a power law, with intervals
candidates  the ways to answer: prompts, neighbours, tuned models
verdict     costs, break-even, the Pareto front, the sentence
run         `decide`: plan, measure, resume, decide
"""
