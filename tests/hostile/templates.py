"""Chat templates of less than a kilobyte that ask for any amount of time or memory, one per way of asking."""

from __future__ import annotations

SAID = "{{ messages[0].content }}"
DOUBLING = "{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"

# name -> source; none of them ends within 3 GB or a minute where nothing bounds it
EXPLODING: dict[str, str] = {
    "product": "{{ 'x' * 10 ** 10 }}",
    "product in steps": "{% set a = 'x' * 1000000 %}{% set b = [a] * 1000000 %}{{ b|join }}",
    "list product": "{{ [[0] * 1000000] * 1000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power in steps": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "doubling by ~": "{% set ns = namespace(s='x') %}" + DOUBLING + "{{ ns.s }}",
    "doubling by +": "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling of lists": "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}{% set ns.s = ns.s|join(ns.s) %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s|replace('x', ns.s) %}{% endfor %}",
    "doubling by a method": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
    "doubling in a block": "{% set ns = namespace(s='x') %}{% for i in range(40) %}"
    "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "doubling by tojson": "{% set ns = namespace(s='\"') %}{% for i in range(40) %}{% set ns.s = ns.s|tojson %}{% endfor %}",
    "center": "{{ 'x'|center(9999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ '1'.zfill(9999999999) }}",
    "indent": "{{ 'x\n'|indent(9999999999) }}",
    "tojson": "{{ [[1]]|tojson(indent=9999999999) }}",
    "format": "{{ '%9999999999d'|format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "str.format": "{{ '{:9999999999d}'.format(1) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "batch": "{{ [1]|batch(9999999999, 'x')|list }}",
    "slice": "{{ [1]|slice(9999999999)|list }}",
    "range": "{{ range(9999999999)|list }}",
    "range sum": "{{ range(9999999999)|sum }}",
    "range in range": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "wordwrap": "{{ ('x ' * 400000)|wordwrap(1)|wordwrap(1, wrapstring='y' * 400000) }}",
    "sort": "{% set a = (range(90000)|list) * 11 %}{% for i in range(9000) %}{{ a|sort|length }}{% endfor %}",
    "sum of lists": "{{ ([range(50000)|list] * 20000)|sum(start=[])|length }}",
    "nested constants": "{{ " + "-" * 900 + "1 }}",
}
