//! Which provider runs which node: ONNX Runtime gives what a provider does not take to another one, without a word.

use std::collections::HashSet;
use std::ffi::{CStr, c_char};

use ort::session::Session;
use ort::{AsPointer, ortsys};

use crate::error::{Error, Result};
use crate::onnx::ModelProto;

/// Makes a session remember its placement; set before it is made.
pub const RECORD: &str = "session.record_ep_graph_assignment_info";

/// A node (after ONNX Runtime's own rewriting) and the provider that runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub provider: String,
    pub node: String,
    pub operator: String,
}

/// Every node of a session that was made with [`RECORD`].
pub fn placement(session: &Session) -> ort::Result<Vec<Placed>> {
    let text = |p: *const c_char| match p.is_null() {
        true => String::new(),
        // SAFETY: the strings are NUL-terminated and live as long as the session.
        false => unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned(),
    };
    let mut placed = Vec::new();
    let (mut parts, mut count) = (std::ptr::null(), 0usize);
    ortsys![unsafe Session_GetEpGraphAssignmentInfo(session.ptr(), &mut parts, &mut count)?];
    for k in 0..count {
        // SAFETY: `parts` holds `count` pointers that live as long as the session; so do the `size` of `nodes` below.
        let part = unsafe { *parts.add(k) };
        let mut provider = std::ptr::null();
        ortsys![unsafe EpAssignedSubgraph_GetEpName(part, &mut provider)?];
        let (mut nodes, mut size) = (std::ptr::null(), 0usize);
        ortsys![unsafe EpAssignedSubgraph_GetNodes(part, &mut nodes, &mut size)?];
        for n in 0..size {
            let node = unsafe { *nodes.add(n) };
            let (mut name, mut operator) = (std::ptr::null(), std::ptr::null());
            ortsys![unsafe EpAssignedNode_GetName(node, &mut name)?];
            ortsys![unsafe EpAssignedNode_GetOperatorType(node, &mut operator)?];
            placed.push(Placed { provider: text(provider), node: text(name), operator: text(operator) });
        }
    }
    Ok(placed)
}

/// Refuses a session in which another provider than `wanted` computes. Shape arithmetic may be anywhere: ONNX Runtime leaves
/// it on the host on purpose, where the sizes are.
pub fn check(placed: &[Placed], wanted: &str, shapes: &HashSet<String>) -> Result<()> {
    let elsewhere: Vec<&Placed> = placed
        .iter()
        .filter(|p| !p.provider.eq_ignore_ascii_case(wanted))
        .filter(|p| !matches!(p.operator.as_str(), "Shape" | "Size") && !shapes.contains(&p.node))
        .collect();
    let Some(first) = elsewhere.first() else { return Ok(()) };
    let some: Vec<String> = elsewhere.iter().take(5).map(|p| format!("{} `{}`", p.operator, p.node)).collect();
    let more = if elsewhere.len() > some.len() { ", ..." } else { "" };
    let short = |p: &str| super::short_name(p).to_ascii_lowercase();
    Err(Error::backend(format!(
        "{} of {} nodes would run on {} instead of {}: {}{more}",
        elsewhere.len(),
        placed.len(),
        short(&first.provider),
        short(wanted),
        some.join(", ")
    ))
    .hint("--strict=false allows it; `disback verify --target` names what a runtime does not take"))
}

/// Names of the nodes that compute sizes: what follows from Shape and constants alone.
pub fn shape_arithmetic(model: &ModelProto) -> HashSet<String> {
    let Some(graph) = &model.graph else { return HashSet::new() };
    let mut constants: HashSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
    let mut sizes: HashSet<&str> = HashSet::new();
    let mut names = HashSet::new();
    for n in &graph.node {
        let inputs = || n.input.iter().map(String::as_str).filter(|i| !i.is_empty());
        if inputs().all(|i| constants.contains(i)) {
            constants.extend(n.output.iter().map(String::as_str));
        } else if matches!(n.op_type(), "Shape" | "Size")
            || inputs().all(|i| sizes.contains(i) || constants.contains(i))
        {
            sizes.extend(n.output.iter().map(String::as_str));
            names.insert(n.name().to_owned());
        }
    }
    names.remove("");
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::edit::node;
    use crate::onnx::GraphProto;

    fn placed(provider: &str, operator: &str, node: &str) -> Placed {
        Placed { provider: format!("{provider}ExecutionProvider"), node: node.into(), operator: operator.into() }
    }

    #[test]
    fn shape_arithmetic_may_be_on_the_host_and_nothing_else() {
        let graph = GraphProto {
            node: vec![
                node("Shape", &["x"], "shape"),
                node("Gather", &["shape", "first"], "rows"),
                node("Concat", &["rows", "rest"], "target"),
                node("Reshape", &["x", "target"], "y"),
                node("Gather", &["table", "labels"], "rows_of_table"),
            ],
            initializer: ["first", "rest", "table"]
                .map(|n| crate::graph::tensors::to_proto(n, &crate::tensor::HostTensor::vec(&[0i64])))
                .into(),
            ..GraphProto::default()
        };
        let shapes = shape_arithmetic(&ModelProto { graph: Some(graph), ..ModelProto::default() });
        let mut names: Vec<&str> = shapes.iter().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["disback/rows", "disback/shape", "disback/target"]);
        let cuda = "CUDAExecutionProvider";
        let fine = [
            placed("CUDA", "Conv", "a"),
            placed("CPU", "Shape", ""),
            placed("CPU", "Gather", "disback/rows"),
            placed("CPU", "Concat", "disback/target"),
        ];
        check(&fine, cuda, &shapes).unwrap();
        let mut bad = fine.to_vec();
        bad.push(placed("CPU", "Gather", "disback/rows_of_table"));
        let e = check(&bad, cuda, &shapes).unwrap_err().to_string();
        assert!(e.contains("1 of 5 nodes would run on cpu instead of cuda: Gather `disback/rows_of_table`"), "{e}");
        // TensorRT's neighbour is not TensorRT.
        let e = check(&fine, "TensorrtExecutionProvider", &shapes).unwrap_err().to_string();
        assert!(e.contains("would run on cuda instead of tensorrt") && e.contains("--strict=false"), "{e}");
    }

    #[test]
    fn a_session_tells_its_placement() {
        let library = super::super::library().unwrap();
        let bytes = crate::runtime::testing::student("batch");
        let session = Session::builder(&library.environment)
            .unwrap()
            .with_config_entry(RECORD, "1")
            .unwrap()
            .commit_from_memory(&bytes)
            .unwrap();
        let placed = placement(&session).unwrap();
        assert!(!placed.is_empty() && placed.iter().all(|p| !p.operator.is_empty()), "{placed:?}");
        check(&placed, "CPUExecutionProvider", &HashSet::new()).unwrap();
        assert!(check(&placed, "CUDAExecutionProvider", &HashSet::new()).is_err());
    }
}
