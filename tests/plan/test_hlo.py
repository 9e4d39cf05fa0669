"""Reading HLO text: shapes, loops and where code came from."""

import jax
import jax.numpy as jnp
import pytest

from mim_jax.plan import hlo

TPU = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/mim_jax/models/blocks.py"
2 "/usr/lib/flax/linen.py"

FunctionNames
1 "Block.__call__"
2 "dense"

FileLocations
1 {file_name_id=1 function_name_id=1 line=127 end_line=127 column=8 end_column=8}
2 {file_name_id=2 function_name_id=2 line=5 end_line=5 column=8 end_column=8}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%cond (wide.param: (s32[], bf16[4,8], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %wide.param = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (wide.param.1: (s32[], bf16[4,8], s32[])) -> (s32[], bf16[4,8], s32[]) {
  %wide.param.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %one = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=2
  %next = s32[]{:T(128)} add(%j, %one), metadata={op_name="jit(step)/while/body/add"}
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.1), index=1
  %y = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} negate(%x), metadata={op_name="jit(step)/while/body/blocks/neg" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"70","bounds":["1","2"]}}
  ROOT %again = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%next, %y, %one)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %unit = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]{:T(128)}) tuple(%copied, %p, %unit)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%start), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %out = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_parse_reads_instructions_shapes_and_memory_spaces():
  module = hlo.parse(TPU)
  assert module.entry == 'main'
  y = module.computations['body'].instructions['y']
  assert (y.opcode, y.operands, y.cycles) == ('negate', ('x',), 70)
  assert y.shape == (hlo.Array('bf16', (4, 8), 1),)
  assert module.computations['main'].instructions['start'].shape[1] == hlo.Array('bf16', (4, 8), 0)
  assert y.shape[0].bytes == 64


def test_parse_refuses_other_text():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('hello\n')


def test_runs_reads_a_trip_count_off_a_counter_whose_stride_comes_from_outside():
  module = hlo.parse(TPU)
  assert [(c.name, n) for c, n in module.runs()] == [('main', 1), ('body', 12)]
  assert module.uncounted == []


@pytest.mark.parametrize(
  ('old', 'new', 'trips'),
  [
    ('constant(12)', 'constant(7)', 7),
    ('direction=LT', 'direction=LE', 13),
    ('%unit = s32[]{:T(128)} constant(1)', '%unit = s32[]{:T(128)} constant(5)', 3),
    ('%zero = s32[]{:T(128)} constant(0)', '%zero = s32[]{:T(128)} constant(4)', 8),
  ],
)
def test_runs_counts_limit_direction_stride_and_start(old, new, trips):
  assert old in TPU
  assert {c.name: n for c, n in hlo.parse(TPU.replace(old, new)).runs()}['body'] == trips


def test_runs_prefers_what_the_compiler_notes():
  noted = TPU.replace('body=%body,', 'body=%body, backend_config={"known_trip_count":{"n":"24"}},')
  assert {c.name: n for c, n in hlo.parse(noted).runs()}['body'] == 24


def test_runs_names_a_loop_that_it_cannot_count():
  module = hlo.parse(TPU.replace('s32[]{:T(128)} add(%j', 's32[]{:T(128)} multiply(%j'))
  assert {c.name: n for c, n in module.runs()}['body'] == 1
  assert module.uncounted == ['jit(step)/while']


def test_source_is_the_innermost_line_of_the_package():
  module = hlo.parse(TPU)
  y = module.computations['body'].instructions['y']
  assert module.source(y, 'mim_jax') == 'models/blocks.py:127'
  assert module.source(y, 'flax') == 'linen.py:5'
  assert module.source(y, 'optax') == ''


def test_runs_of_a_compiled_scan_inside_a_scan():
  def inner(x, _):
    return jnp.sin(x @ x), None

  def outer(x, _):
    return jax.lax.scan(inner, x, None, length=5)[0], None

  compiled = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=3)[0]).lower(jnp.ones((16, 16))).compile()
  module = hlo.parse(compiled.as_text())
  assert max(times for _, times in module.runs()) == 15
  assert not module.uncounted


def test_attribute_ends_at_the_comma_outside_of_brackets():
  line = '  %c = f32[2,3]{1,0} convolution(%a, %b), window={size=2x1 pad=0_0x0_0}, dim_labels=b0f_0io->b0f, metadata={op_name="x, y=3"}'
  instruction = hlo._instruction(line)
  assert instruction.attribute('window') == '{size=2x1 pad=0_0x0_0}'
  assert instruction.attribute('dim_labels') == 'b0f_0io->b0f'
  assert instruction.attribute('missing') == ''
