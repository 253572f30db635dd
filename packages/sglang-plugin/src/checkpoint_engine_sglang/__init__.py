"""The SGLang plugin: new weights reach a serving SGLang in place."""
