"""The chat templates that go by name."""

# The formats of OpenAI's ChatML (which Qwen uses), Llama 3 and 3.1 (a tool's role is ipython), and Gemma (no system role:
# its text opens the first user turn).
CHAT_TEMPLATES = {
    "plain": r"""
{%- set labels = {"system": "", "user": "Q: ", "assistant": "A: ", "tool": "Tool: "} -%}
{%- for message in messages -%}
    {{ "" if loop.first else "\n" }}
    {{- labels[message["role"]] + message["content"] }}
    {{- eos_token if message["role"] == "assistant" else "" }}
{%- endfor -%}
{{ ("\nA:" if messages else "A:") if add_generation_prompt else "" }}""",
    "chatml": r"""
{%- for message in messages -%}
    {{ "<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n" }}
{%- endfor -%}
{{ "<|im_start|>assistant\n" if add_generation_prompt else "" }}""",
    "llama3": r"""
{{- bos_token }}
{%- for message in messages -%}
    {%- set role = "ipython" if message["role"] == "tool" else message["role"] -%}
    {{ "<|start_header_id|>" + role + "<|end_header_id|>\n\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor -%}
{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt else "" }}""",
    "gemma": r"""
{{- bos_token }}
{%- set has_system = messages and messages[0]["role"] == "system" -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if (message["role"] == "assistant") != (loop.index0 % 2 == 1) -%}
        {{ raise_exception("user (or tool) and assistant messages must alternate, after at most one system message") }}
    {%- endif -%}
    {{ "<start_of_turn>" + ("model" if message["role"] == "assistant" else "user") + "\n" }}
    {{- messages[0]["content"] + "\n\n" if loop.first and has_system else "" }}
    {{- message["content"] | trim + "<end_of_turn>\n" }}
{%- endfor -%}
{{ "<start_of_turn>model\n" if add_generation_prompt else "" }}""",
    "roles": r"""
{%- for message in messages -%}
    {{ "<|" + message["role"] + "|>" + message["content"] + "<|end|>" }}
{%- endfor -%}
{{ "<|assistant|>" if add_generation_prompt else "" }}""",
}
