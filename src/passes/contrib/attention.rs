//! Attention of ONNX Runtime's optimiser as products of matrices: without past keys, masks only as a bias of the scores.

use std::collections::{HashMap, HashSet};

use crate::graph::edit;
use crate::graph::edit::{int_attribute, ints_attribute, node};
use crate::graph::op_schema::{self, Class};
use crate::onnx::{GraphProto, NodeProto};
use crate::passes::contrib::Writer;

/// Values that are known to have four axes: turned or reshaped so, and what is made of them element by element, joined or
/// normalised. Keys and values may come that way, [B, heads, L, D].
pub(super) fn by_head(graph: &GraphProto, dims: &HashMap<String, Vec<i64>>) -> HashSet<String> {
    let reads = |n: &NodeProto, found: &HashSet<String>| n.input.iter().any(|i| found.contains(i));
    let mut found = HashSet::new();
    for n in &graph.node {
        let four = match n.op_type() {
            "Transpose" => edit::ints(n, "perm").is_some_and(|p| p.len() == 4),
            "Reshape" => n.input.get(1).and_then(|s| dims.get(s)).is_some_and(|d| d[..] == [4]),
            "Concat" | "Identity" | "Slice" | "RotaryEmbedding" => reads(n, &found),
            op => {
                let class = op_schema::find(n.domain(), op).map(|row| row.class);
                matches!(class, Some(Class::Elementwise | Class::Norm)) && reads(n, &found)
            }
        };
        if four {
            found.extend(n.output.first().cloned());
        }
    }
    found
}

impl Writer {
    /// q, k, v [B, T, heads D] apart, k and v also [B, heads, L, D], or k and v in one [B, L, heads, 2, D], or all three in one [B, T, heads, 3, D].
    pub(super) fn multi_head(&mut self, n: &NodeProto, out: &str) -> Option<()> {
        let given = |i: usize| n.input.get(i).map(String::as_str).filter(|s| !s.is_empty());
        let only_one = n.output.iter().skip(1).all(String::is_empty);
        if !only_one || given(4).is_some() || (6..n.input.len()).any(|i| given(i).is_some()) || causal(n) {
            return None;
        }
        let heads = heads(n)?;
        let parts = match (given(0)?, given(1), given(2), given(3)) {
            // A bias speaks of rows, not of heads.
            (_, Some(k), Some(v), Some(_)) if [k, v].iter().any(|x| self.by_head.contains(*x)) => return None,
            (q, Some(k), Some(v), bias) => {
                let size = bias.map(|b| self.dims.get(b).and_then(|d| d.first()).copied());
                // Where v is narrower, the bias says nothing of the widths.
                let width = match size {
                    Some(size) => Some(size.filter(|s| s % 3 == 0)? / 3),
                    None => None,
                };
                let mut parts = Vec::new();
                for (k, x) in [q, k, v].into_iter().enumerate() {
                    let biased = match (bias, width) {
                        (Some(b), Some(w)) => {
                            let part = self.slice(b, w * k as i64, w * (k as i64 + 1), out);
                            self.op("Add", &[x, &part], out)
                        }
                        _ => x.to_owned(),
                    };
                    parts.push(match self.by_head.contains(&biased) {
                        true => biased,
                        false => self.split_heads(&biased, heads, out),
                    });
                }
                parts
            }
            (q, Some(packed), None, None) => {
                let q = self.split_heads(q, heads, out);
                let [k, v] = [0, 1].map(|i| self.piece(packed, i, out));
                vec![q, k, v]
            }
            (packed, None, None, None) => [0, 1, 2].map(|i| self.piece(packed, i, out)).to_vec(),
            _ => return None,
        };
        self.attend(n, &parts, given(5), out);
        Some(())
    }

    /// The projection included: x [B, T, C], W [C, 3 hidden], b [3 hidden].
    pub(super) fn packed(&mut self, n: &NodeProto, out: &str) -> Option<()> {
        let given = |i: usize| n.input.get(i).map(String::as_str).filter(|s| !s.is_empty());
        let only_one = n.output.iter().skip(1).all(String::is_empty);
        let rotary = edit::int(n, "do_rotary").unwrap_or(0) != 0;
        if !only_one || rotary || causal(n) || given(3).is_some() || given(4).is_some() || given(6).is_some() {
            return None;
        }
        let heads = heads(n)?;
        let width = self.dims.get(given(1)?).and_then(|d| d.last()).copied()?;
        let sizes = edit::ints(n, "qkv_hidden_sizes").map_or(vec![width / 3; 3], <[i64]>::to_vec);
        if sizes.len() != 3 || sizes.iter().sum::<i64>() != width {
            return None;
        }
        let mut all = self.op("MatMul", &[given(0)?, given(1)?], out);
        if let Some(b) = given(2) {
            all = self.op("Add", &[&all, b], out);
        }
        let names = [0, 1, 2].map(|k| self.name(&format!("{out}/part_{k}")));
        let lengths = self.ints(out, &sizes);
        let mut split = node("Split", &[&all, &lengths], &names[0]);
        split.output = names.to_vec();
        split.attribute.push(int_attribute("axis", -1));
        self.nodes.push(split);
        let parts = names.map(|x| self.split_heads(&x, heads, out));
        self.attend(n, &parts, given(5), out);
        Some(())
    }

    /// [B, T, heads D] as [B, heads, T, D].
    fn split_heads(&mut self, x: &str, heads: i64, base: &str) -> String {
        let shape = self.ints(base, &[0, 0, heads, -1]);
        let x = self.op("Reshape", &[x, &shape], base);
        self.op_with("Transpose", &[&x], base, ints_attribute("perm", &[0, 2, 1, 3]))
    }

    /// One of [B, T, heads, n, D] as [B, heads, T, D].
    fn piece(&mut self, packed: &str, k: i64, base: &str) -> String {
        let at = self.held(base, &crate::tensor::HostTensor::scalar(k));
        let x = self.op_with("Gather", &[packed, &at], base, int_attribute("axis", 3));
        self.op_with("Transpose", &[&x], base, ints_attribute("perm", &[0, 2, 1, 3]))
    }

    fn attend(&mut self, n: &NodeProto, parts: &[String], bias: Option<&str>, out: &str) {
        let [q, k, v] = [0, 1, 2].map(|i| parts[i].as_str());
        let across = self.op_with("Transpose", &[k], out, ints_attribute("perm", &[0, 1, 3, 2]));
        let scores = self.op("MatMul", &[q, &across], out);
        let scale = n.attribute.iter().find(|a| a.name() == "scale").and_then(|a| a.f).filter(|&s| s != 0.0);
        let mut scores = match scale {
            Some(s) => {
                let s = self.number(out, f64::from(s));
                self.op("Mul", &[&scores, &s], out)
            }
            None => {
                // By the root of a head's width, which the graph knows.
                let size = self.op("Shape", &[q], out);
                let width = self.slice(&size, -1, i64::MAX, out);
                let width = self.op_with("Cast", &[&width], out, int_attribute("to", 1));
                let root = self.op("Sqrt", &[&width], out);
                self.op("Div", &[&scores, &root], out)
            }
        };
        if let Some(b) = bias {
            scores = self.op("Add", &[&scores, b], out);
        }
        let weights = self.op_with("Softmax", &[&scores], out, int_attribute("axis", -1));
        let y = self.op("MatMul", &[&weights, v], out);
        let y = self.op_with("Transpose", &[&y], out, ints_attribute("perm", &[0, 2, 1, 3]));
        let shape = self.ints(out, &[0, 0, -1]);
        self.nodes.push(node("Reshape", &[&y, &shape], out));
    }
}

fn heads(n: &NodeProto) -> Option<i64> {
    edit::int(n, "num_heads").filter(|h| *h > 0)
}

fn causal(n: &NodeProto) -> bool {
    edit::int(n, "unidirectional").unwrap_or(0) != 0
}
