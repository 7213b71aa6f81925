"""Pipelines: ordered stages in one file, read and checked as a whole, skipped or resumed where they can be."""

from llmlab.pipeline.reading import Pipeline, PipelineStage, read_pipeline
from llmlab.pipeline.running import Step, execute, plan, run_stage

__all__ = ["Pipeline", "PipelineStage", "Step", "execute", "plan", "read_pipeline", "run_stage"]
