//! Bytes through everything that happens to a model before libtorch is asked: decoding, functions, lowering, roles,
//! fusing, writing back. Nothing may panic, overflow the stack, run without end or ask for memory without end.
#![no_main]

mod mutate;

use bytes::Bytes;
use disback::graph::lower::lower;
use disback::graph::roles::{classify, untangle};
use disback::graph::{Model, TrainableChoice, fuse, save};
use libfuzzer_sys::{fuzz_crossover, fuzz_mutator, fuzz_target};

fuzz_target!(|data: &[u8]| {
    let _ = load(data);
});
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { mutate::mutate(data, size, max_size, seed) });
fuzz_crossover!(|a: &[u8], b: &[u8], out: &mut [u8], seed: u32| { mutate::cross(a, b, out, seed) });

fn load(data: &[u8]) -> disback::Result<()> {
    let model = Model::from_bytes(Bytes::copy_from_slice(data))?;
    let mut graph = lower(&model)?;
    graph.remove_dead();
    let provenance = untangle(&mut graph, None);
    let roles = classify(&graph, &TrainableChoice::default(), &provenance)?;
    let values: Vec<_> = roles.parameters.iter().map(|p| graph.constants[&p.value].tensor.clone()).collect();
    let trained = roles.parameters.iter().map(|p| p.value).collect();
    fuse::fuse(&mut graph, &trained);
    graph.remove_dead();
    let written = save::with_parameters(&model.proto, &roles.parameters, &roles.buffers, &values, false)?;
    // What we write, we read.
    lower(&Model::from_proto(written)).expect("a model that was read and written back is read again");
    let _ = model.hash();
    Ok(())
}
