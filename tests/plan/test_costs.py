"""Counting FLOPs, memory traffic and collectives in compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mim_jax.plan import collectives, contributors, costs, hlo

HEAD = 'HloModule m\n\n'
MESH = {'data': 2, 'fsdp': 4, 'tensor': 2}


def line(text):
  return hlo._instruction(text)


def entry(body, others=''):
  return hlo.parse(f'{HEAD}{others}\nENTRY %main (p: f32[8,8]) -> f32[8,8] {{\n{body}\n}}\n')


def test_flops_of_a_compiled_program_with_loop_and_batched_product():
  def f(x, w):
    def body(x, _):
      return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(body, x, None, length=7)
    return jnp.einsum('bnd,bmd->bnm', x.reshape(4, 8, 32), x.reshape(4, 8, 32))

  compiled = jax.jit(f).lower(jnp.ones((32, 32)), jnp.ones((32, 32))).compile()
  found = costs.works(hlo.parse(compiled.as_text()))
  assert sum(work.flops for work in found) == 2 * (7 * 32**3 + 4 * 8 * 8 * 32)


@pytest.mark.parametrize(
  ('text', 'lhs', 'rhs', 'flops'),
  [
    # [10, 5, 7] x [7, 3] as the TPU compiler writes it, with 5 as a spatial dimension
    ('f32[10,5,3] convolution(%a, %b), window={size=1}, dim_labels=b0f_0io->b0f', (10, 5, 7), (1, 7, 3), 2 * 10 * 5 * 7 * 3),
    # a product for each of 6 batch entries: the window hits one input, the rest is padding
    ('f32[6,4,3] convolution(%a, %b), window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf', (6, 4, 7), (6, 7, 3), 2 * 6 * 4 * 7 * 3),
    # patch embedding: 16 x 16 pixels of 3 channels, 14 x 14 patches
    ('f32[2,14,14,8] convolution(%a, %b), window={size=16x16 stride=16x16}, dim_labels=b01f_01io->b01f', (2, 224, 224, 3), (16, 16, 3, 8), 2 * 2 * 14 * 14 * 8 * 768),
    # 3 x 3 with padding 1 on 4 x 4: of 4 x 3 pairs an axis, 2 fall into the padding
    ('f32[1,4,4,1] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f', (1, 4, 4, 1), (3, 3, 1, 1), 2 * 10 * 10),
  ],
)  # fmt: skip
def test_convolution_flops_leave_out_padding(text, lhs, rhs, flops):
  assert costs.convolution_flops(line(f'  %c = {text}'), lhs, rhs) == flops


def test_flops_of_library_calls():
  module = entry("""  %p = f32[8,16]{1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %q = bf16[2,3,50,64]{3,2,1,0} parameter(2)
  %k = bf16[2,3,40,64]{3,2,1,0} parameter(3)
  %gemm = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%p, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %attention = (bf16[2,3,50,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "50", "40"], "tuple_shapes": []}}}
  ROOT %r = f32[8,4]{1,0} get-tuple-element(%gemm), index=0""")
  found = {work.instruction.name: work.flops for work in costs.works(module)}
  assert found == {'gemm': 2 * 8 * 16 * 4, 'attention': 2 * 2 * 2 * 3 * 50 * 40 * 64}


def test_pallas_kernel_counts_what_its_author_states():
  module = entry("""  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %k = bf16[8,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1000","transcendentals":"3","bytes_accessed":"77"}}}""")
  (work,) = costs.works(module)
  assert (work.kind, work.flops, work.bytes) == ('kernel', 1000, 77)


def test_memory_counts_main_memory_only():
  module = entry("""  %p = f32[8,8]{1,0} parameter(0)
  %near = f32[8,8]{1,0:S(1)} negate(%p)
  %both = f32[8,8]{1,0:S(1)} add(%near, %near)
  ROOT %far = f32[8,8]{1,0} negate(%both)""")
  assert [work.bytes for work in costs.works(module)] == [256, 0, 256]


def test_memory_of_slices_and_updates_in_place():
  module = entry(
    """  %p = f32[12,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,8,8]{2,1,0} fusion(%p, %i), kind=kLoop, calls=%slicing
  %z = f32[12,8,8]{2,1,0} fusion(%p, %x, %i), kind=kLoop, calls=%updating
  ROOT %r = f32[12,8,8]{2,1,0} copy(%z)""",
    """%slicing (a: f32[12,8,8], b: s32[]) -> f32[1,8,8] {
  %a = f32[12,8,8]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %s = f32[1,8,8]{2,1,0} dynamic-slice(%a, %b), dynamic_slice_sizes={1,8,8}
}
%updating (c: f32[12,8,8], d: f32[1,8,8], e: s32[]) -> f32[12,8,8] {
  %c = f32[12,8,8]{2,1,0} parameter(0)
  %d = f32[1,8,8]{2,1,0} parameter(1)
  %e = s32[] parameter(2)
  ROOT %u = f32[12,8,8]{2,1,0} dynamic-update-slice(%c, %d, %e)
}""",
  )
  one, whole = 256, 12 * 256
  assert [work.bytes for work in costs.works(module)] == [2 * one + 4, 2 * one + 4, 2 * whole]


def test_memory_of_prefetched_slices():
  module = entry("""  %p = f32[8,8]{1,0} parameter(0)
  %s = ((f32[8,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2], [0:8]}
  %d = f32[2,8]{1,0:S(1)} slice-done(%s)
  %c = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %e = f32[8,8]{1,0:S(1)} copy-done(%c)
  ROOT %r = f32[8,8]{1,0} reshape(%e)""")
  assert [(work.kind, work.bytes) for work in costs.works(module)] == [('beside', 64), ('beside', 256), ('other', 256)]


@pytest.mark.parametrize(
  ('groups', 'devices'),
  [
    ('{{0,2,4},{1,3,5}}', [0, 2, 4]),
    ('[2,8]<=[16]', list(range(8))),
    ('[8,2]<=[2,8]T(1,0)', [0, 8]),
    ("mesh['a'=2,'b'=4,'c'=2] {'b'}", [0, 2, 4, 6]),
    ("mesh['a'=2,'b'=4,'c'=2] {'a','c'}", [0, 1, 8, 9]),
    ("mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [3, 1]),
    ("mesh['a'=16] {'a':(2)4}", [0, 2, 4, 6]),
  ],
)
def test_device_group_reads_every_form(groups, devices):
  assert collectives.device_group(f', replica_groups={groups}, dimensions={{0}}', 16).tolist() == devices


def test_collectives_of_a_compiled_program_have_kind_axis_and_bytes(devices):
  mesh = jax.make_mesh((2, 4, 1), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P('fsdp')))
  y = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, P(('data', 'fsdp'))))
  whole = NamedSharding(mesh, P())
  compiled = jax.jit(lambda x, y: (x, jnp.sum(y)), out_shardings=(whole, whole)).lower(x, y).compile()
  found = {c.kind: c for c in collectives.find(hlo.parse(compiled.as_text()), dict(mesh.shape), 4)}
  gather, reduce = found['all-gather'], found['all-reduce']
  assert (gather.axes, gather.group, gather.members, gather.bytes) == ('fsdp', 4, 4, 64 * 32 * 4)
  assert (reduce.axes, reduce.group, reduce.members, reduce.bytes) == ('data+fsdp', 8, 4, 4)


def test_collectives_that_begin_inside_a_fusion_are_counted_once():
  module = entry(
    """  %p = f32[8,8]{1,0} parameter(0)
  %begin = (f32[8,8]{1,0}, f32[32,8]{1,0}) fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
  %half = f32[8,8]{1,0} get-tuple-element(%begin), index=0
  %middle = (f32[8,8]{1,0}, f32[32,8]{1,0}) fusion(%half), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %scatter = f32[2,8]{1,0} fusion(%half), kind=kCustom, calls=%all-reduce-scatter.3""",
    """%async_collective_fusion.1 (a: f32[8,8]) -> (f32[8,8], f32[32,8]) {
  %a = f32[8,8]{1,0} parameter(0)
  %g = f32[32,8]{1,0} all-gather(%a), channel_id=1, replica_groups=mesh['x'=2,'y'=4,'z'=2] {'y'}, dimensions={0}
  ROOT %c = (f32[8,8]{1,0}, f32[32,8]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.2 (b: f32[8,8]) -> (f32[8,8], f32[32,8]) {
  %b = f32[8,8]{1,0} parameter(0)
  %h = f32[32,8]{1,0} all-gather(%b), channel_id=1, replica_groups=mesh['x'=2,'y'=4,'z'=2] {'y'}, dimensions={0}
  ROOT %t = (f32[8,8]{1,0}, f32[32,8]{1,0}) tuple(%b, %h)
}
%all-reduce-scatter.3 (d: f32[8,8]) -> f32[2,8] {
  %d = f32[8,8]{1,0} parameter(0)
  %i = s32[] constant(0)
  %r = f32[8,8]{1,0} all-reduce(%d), channel_id=2, replica_groups=mesh['x'=2,'y'=4,'z'=2] {'y'}, to_apply=%sum
  ROOT %s = f32[2,8]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,8}
}""",
  )
  found = collectives.find(module, MESH, 16)
  assert [(c.kind, c.axes, c.hidden, c.bytes, c.count) for c in found] == [
    ('all-gather', 'fsdp', True, 1024, 1),
    ('reduce-scatter', 'fsdp', False, 256, 1),
  ]


def test_permutes_along_one_axis_of_several():
  pairs = ','.join(f'{{{i},{i ^ 2}}}' for i in range(16))  # neighbours on fsdp, everywhere
  module = entry(f"""  %p = f32[8,8]{{1,0}} parameter(0)
  ROOT %c = f32[8,8]{{1,0}} collective-permute(%p), channel_id=1, source_target_pairs={{{pairs}}}""")
  (found,) = collectives.find(module, MESH, 16)
  assert (found.axes, found.bytes) == ('fsdp', 256)


def test_permutes_between_islands_have_no_members_beside_themselves():
  module = entry("""  %p = f32[8,8]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,8},{8,0}}""")
  (found,) = collectives.find(module, MESH, 8)
  assert (found.kind, found.axes, found.members) == ('collective-permute', 'data', 1)


@pytest.mark.parametrize(
  ('op_name', 'expected'),
  [
    (
      'jit(step)/transpose(jvp(Decoder))/while/body/closed_call/blocks/attn/bhnm,bmhd->bnhd/dot_general',
      ('Decoder/blocks/attn', 'backward', 'dot_general bhnm,bmhd->bnhd'),
    ),
    ('jit(step)/jvp(ViT)/patch_embed/add', ('ViT/patch_embed', 'forward', 'add')),
    (
      'jit(step)/transpose(jvp(ViT))/while/body/checkpoint/rematted_computation/blocks/mlp/fc1/dot_general',
      ('ViT/blocks/mlp/fc1', 'recomputed', 'dot_general'),
    ),
    ('jit(step)/mul', ('step', '', 'mul')),
    ('', ('(made by the compiler)', '', 'copy')),
  ],
)
def test_code_name(op_name, expected):
  assert contributors.code_name(line(f'  %c = f32[2] copy(%a), metadata={{op_name="{op_name}"}}')) == expected


def test_contributors_add_up_and_come_largest_first():
  module = entry("""  %p = f32[8,8]{1,0} parameter(0)
  %a = f32[8,8]{1,0} negate(%p), metadata={op_name="jit(step)/jvp(A)/neg"}, backend_config={"estimated_cycles":"30"}
  %b = f32[8,8]{1,0} negate(%a), metadata={op_name="jit(step)/jvp(B)/neg"}, backend_config={"estimated_cycles":"50"}
  ROOT %c = f32[8,8]{1,0} negate(%b), metadata={op_name="jit(step)/jvp(A)/neg"}, backend_config={"estimated_cycles":"20"}""")
  found = contributors.rank(module, costs.works(module), lambda work: work.cycles, 'mim_jax')
  assert {c['name']: c['share'] for c in found} == {'A': 0.5, 'B': 0.5}
  assert len(contributors.rank(module, costs.works(module), lambda work: work.cycles, 'mim_jax', count=1)) == 1
  assert np.isclose(sum(c['cost'] for c in found), 100)
