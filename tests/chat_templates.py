"""Chat templates of four families, each with the habits that templates of its kind have.

Written for the tests, over tokens that the tiny model has. They differ in how they take arguments
(as JSON, pair by pair), content (a text, parts), roles, thoughts and white space.
"""

from __future__ import annotations

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\nUse these functions:' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.name %}{{ '(' + message.name + ') ' }}{% endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

THINKING = """\
{%- set state = namespace(asked=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set state.asked = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- '<function=' + tool.function.name + '>' + (tool.function.description or '') }}
        {%- for key, value in ((tool.function.parameters or {}).properties or {}) | items %}
            {{- '\\n' + key + ': ' + (value | tojson) }}
        {%- endfor %}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > state.asked %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name }}
            {%- for key, value in call.function.arguments | items %}
                {{- '\\n' + key + '=' + (value if value is string else value | tojson) }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """\
{{- bos_token + '<|begin_of_text|>' }}
{%- macro say(message) %}
    {%- if message.content is string %}{{ message.content | trim }}
    {%- else %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif %}
{%- endmacro %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=1) }}{% endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model calls one function at a time') }}
        {%- endif %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
        {{- say(message) }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

NO_SYSTEM = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

FAMILIES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "headers": HEADERS,
    "no_system": NO_SYSTEM,
}
#: The token that ends an answer, by family.
ENDS = {
    "chatml": "<|im_end|>",
    "thinking": "<|im_end|>",
    "headers": "<|eot_id|>",
    "no_system": "<end_of_turn>",
}
