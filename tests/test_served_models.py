"""Which models the plugin for vLLM registers. `tests/serving` runs them; this needs no vLLM."""

from modeling_sumagg.serving import served_models


def test_language_models_are_served_and_no_other_families():
    served = served_models()
    assert served["SumAggForCausalLM"] == served["ToSTForCausalLM"] == "CausalLM"
    assert served["ToSTTextForSequenceClassification"] == "SequenceClassification"
    assert served["SumAggModel"] == "Embedding"
    for other in ("ToSTModel", "ToSTForImageClassification", "SumAggForMultimodalRegression", "SumAggSpeechModel"):
        assert other not in served
