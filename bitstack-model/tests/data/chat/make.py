"""Renders the templates beside this file with transformers, and writes what comes out to golden.json.

    python make.py          (transformers 5.24, jinja2 3.1.6)

The templates are written for the formats that the families' model cards describe, each with the parts of Jinja and Python that the family's own template
uses.
"""
import datetime, json, pathlib
from transformers.utils import chat_template_utils as utils

NOW = 1_700_000_000  # seconds; 14 November 2023, 22:13:20 UTC


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW, datetime.timezone.utc)


utils.datetime = Clock
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def say(*texts, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [
    (say("Hello, world"), True),
    (say("Why is the sky blue?\n", system="  You are brief. "), True),
    (say("One", "Two", "Three"), True),
    (say("  \"Zwölf\" <Boxkämpfer> & 'Sylt' 🎉 {{ x }}  ", "Line 1\nLine 2\n", "\ttab", "<think>\nhm\n</think>\n\n42 ", system="A\nB"), False),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": ""}], True),
]

EXPRESSIONS = [
    "{{ bos_token }}{{ pad_token }}|{{ tools }}|{{ true }}|{{ 1.0 }}|{{ [1, 'a', none] }}",
    "{{ messages[0]['content'] | trim }}|{{ messages[1].content.strip() }}|",
    "{{ messages[0] | tojson }}",
    "{{ {'b': [1, 2.5, 1e16, 1e-05, 123456789.125, true, none, []], 'a': {}} | tojson }}",
    "{{ {'b': 'ü', 'a': [1, {}]} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
    "{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}",
    "{{ [1] | tojson(indent='--') }}{{ [] | tojson(indent=4) }}",
    "{{ '\\x7f\\u2028\\n\\t\\x01\\\"😀' | tojson }}{{ '😀' | tojson(ensure_ascii=true) }}",
    "{% for m in messages[::-1] %}{{ m.role }} {% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['role'] }}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{%- generation -%}\n a {% endgeneration %}\nb",
    "x  {% generation %}\n a {%- endgeneration -%}\nb",
    "a\n    {% if true %}\n    b\n    {% endif %}\nc\n",
    "a\n  {#- note #}\n  {{- 'b' -}}\n\n c\n\n",
    "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d %H:%M:%S') }}|{{ strftime_now('%A, %B %-d %j %y %I %p') }}",
    "{{ 'a,b'.split(',')[-1] }}{{ 'abc'.startswith('a') }}{{ 'x'.upper() }}{{ 'a b'.title() }}{{ 'ABc'.capitalize() }}",
    "{{ 'a,b,c'.split(',', 1) }}{{ ' a  b '.split(' ') }}{{ ' a  b '.split() }}{{ 'a\\nb\\n'.splitlines() }}",
    "{{ '</think>' in messages[0].content }}{{ messages[0].get('name', 'no') }}{{ messages[0].get('name') }}",
    "{% for k, v in messages[1].items() %}{{ k }}={{ v | length }} {% endfor %}{{ messages[0].keys() | list }}",
    "{% macro m(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}{{ m(x='a', y='b') }}",
    "{{ messages | map(attribute='role') | join(', ') }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ range(3, -1, -1) | list }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -7 % 3 }}{{ -7 // 2 }}{{ 2 ** 3 }}",
    "{{ 'a' if messages is string else 'b' }}{{ x is defined }}{{ messages is iterable }}{{ none is none }}{{ messages[0] is mapping }}",
    "{{ 'a' 'b' ~ 1 ~ none ~ true }}{{ '%s-%d' | format('x', 3) }}{{ '{} {}'.format(1, 'b') }}",
    "{{ messages[0].content.lstrip().rstrip().replace('Hi', 'Ho') }}{{ 'xxaxx'.strip('x') }}",
    "{{ messages[5] }}{{ messages[0].nothing }}{{ messages[0].nothing is none }}{{ messages[0].nothing is not defined }}",
    "{{ 'abcdef'[1:-2] }}{{ messages[1:] | length }}{{ [1,2,3][::2] }}{{ 'abc'[::-1] }}{{ messages[-1]['role'] }}",
    "{{ dict(a=1, b='x') }}{{ {'a': {'b': 1}} }}{{ (1, 2) }}{{ (1,) }}",
    "{{ namespace(name='x' if messages else '').name }}{{ not messages }}{{ 1 in [1] and 2 not in [1] }}",
    "{% if messages[0].role == 'user' and (messages | length) > 1 %}y{% elif false %}n{% else %}o{% endif %}",
    "{% set x = messages[0].content %}{% set y %}<{{ x | upper }}>{% endset %}{{ y | trim }}{{ y.endswith('> ') }}",
    "{{ 'a-b_c' | replace('-', '_') }}{{ ['b', 'a'] | sort | first }}{{ [1, 2] + [3] }}{{ [3, 1] | max }}{{ '5' | int + 1 }}",
    "{{ 'x'.find('y') }}{{ 'aXbX'.count('X') }}{{ 'ab'.isalpha() }}{{ ','.join(['a', 'b']) }}{{ 'a' < 'b' }}",
    "{% for a in [1, 2, 3] if a > 1 %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{% else %}none{% endfor %}",
    "{% raw %}{{ x }}{% endraw %}{{ '{{' }}{{ \"it's\" }}",
    "{{ 1e3 }}|{{ 10000000000000000000 }}|{{ 0.1 + 0.2 }}",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.cycle('a', 'b') }}{{ loop.length }}{% endfor %}",
    "{{ messages[0].content | default('x') }}{{ zzz | default('x') }}{{ '' | default('x', true) }}{{ zzz is undefined }}",
    "{{ raise_exception('no ' ~ messages[0].role) }}",
]


def render(template, messages, answer):
    try:
        texts, _ = utils.render_jinja_template([messages], chat_template=template, add_generation_prompt=answer, **TOKENS)
        return texts[0]
    except Exception as error:
        return {"refused": str(error)}


folder = pathlib.Path(__file__).parent
families = {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}
messages = [{"role": "user", "content": "  Hi <b>&'\" ü  "}, {"role": "assistant", "content": "Yo\n"}]
golden = {
    "now": NOW,
    "tokens": TOKENS,
    "conversations": [{"messages": m, "answer": answer} for m, answer in CONVERSATIONS],
    "families": {name: [render(template, m, answer) for m, answer in CONVERSATIONS] for name, template in families.items()},
    "messages": messages,
    "expressions": [[template, render(template, messages, True)] for template in EXPRESSIONS],
}
(folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
