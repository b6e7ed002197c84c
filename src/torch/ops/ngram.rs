//! Counting n-grams of integers.

use std::collections::HashMap;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, one};
use crate::torch::exec::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("TfIdfVectorizer", 9, (1, 1), tf_idf);
}

/// How often each n-gram of a pool occurs, with gaps of up to `max_skip_count`; computed on the host.
fn tf_idf(node: &Node) -> Result<Kernel> {
    let a = &node.attributes;
    if a.strings("pool_strings")?.is_some() {
        return Err(Error::unsupported("TfIdfVectorizer of strings"));
    }
    let missing = |name: &str| Error::invalid(format!("attribute `{name}` is missing"));
    let pool = a.ints("pool_int64s")?.ok_or_else(|| missing("pool_int64s"))?;
    let starts = a.ints("ngram_counts")?.ok_or_else(|| missing("ngram_counts"))?;
    let columns = a.ints("ngram_indexes")?.ok_or_else(|| missing("ngram_indexes"))?;
    let shortest = a.int("min_gram_length")?.ok_or_else(|| missing("min_gram_length"))?;
    let longest = a.int("max_gram_length")?.ok_or_else(|| missing("max_gram_length"))?;
    let skips = a.int("max_skip_count")?.ok_or_else(|| missing("max_skip_count"))?;
    let mode = a.string("mode")?.ok_or_else(|| missing("mode"))?;
    let weights = a.floats("weights")?;
    if !matches!(mode.as_str(), "TF" | "IDF" | "TFIDF") {
        return Err(Error::invalid(format!("attribute `mode` is `{mode}`")));
    }
    // The pool lists all 1-grams, then all 2-grams, and so on, each part from its start.
    let mut grams: HashMap<Vec<i64>, usize> = HashMap::new();
    let mut id = 0;
    for (k, &start) in starts.iter().enumerate() {
        let end = starts.get(k + 1).copied().unwrap_or(pool.len() as i64);
        let part = usize::try_from(start).ok().zip(usize::try_from(end).ok()).and_then(|(s, e)| pool.get(s..e));
        let part = part.ok_or_else(|| Error::invalid("attribute `ngram_counts` does not fit the pool"))?;
        for gram in part.chunks_exact(k + 1) {
            if (shortest..=longest).contains(&(k as i64 + 1)) {
                grams.insert(gram.to_vec(), id);
            }
            id += 1;
        }
    }
    let columns: Vec<usize> = columns.iter().map(|&c| usize::try_from(c).unwrap_or(usize::MAX)).collect();
    let width = columns.iter().max().map_or(0, |&c| c.saturating_add(1));
    if columns.len() != id || width > 1 << 28 || weights.as_ref().is_some_and(|w| w.len() < width) {
        return Err(Error::invalid("attributes `ngram_indexes` or `weights` do not fit the pool"));
    }
    Ok(Kernel::new(move |a| {
        let shape = a.shape(0)?;
        if shape.len() > 2 {
            return Err(Error::invalid(format!("input of shape {shape:?}, expected rank 1 or 2")));
        }
        let values = a.ints(0)?;
        let row = shape.last().copied().unwrap_or(1).max(1) as usize;
        let rows = if shape.len() == 2 { shape[0] as usize } else { 1 };
        let mut counts = vec![0f64; rows * width];
        for (values, counts) in values.chunks(row).zip(counts.chunks_mut(width.max(1))) {
            // No gram and no gap is longer than its row.
            let most = values.len() as i64;
            for n in shortest.max(1)..=longest.min(most) {
                // A single element has no gaps to vary.
                for gap in 1..=(if n == 1 { 1 } else { skips.clamp(0, most) + 1 }) {
                    for start in 0..values.len() {
                        let at = (0..n).map(|i| start + (i * gap) as usize);
                        let gram: Option<Vec<i64>> = at.map(|i| values.get(i).copied()).collect();
                        if let Some(&id) = gram.and_then(|g| grams.get(&g)) {
                            counts[columns[id]] += 1.0;
                        }
                    }
                }
            }
            for (i, c) in counts.iter_mut().enumerate() {
                let w = weights.as_ref().map_or(1.0, |w| f64::from(w[i]));
                *c = match mode.as_str() {
                    "TF" => *c,
                    "IDF" => {
                        if *c > 0.0 {
                            w
                        } else {
                            0.0
                        }
                    }
                    _ => *c * w,
                };
            }
        }
        let t = Tensor::f_from_slice(&counts)?.f_to_kind(tch::Kind::Float)?;
        let shape = if shape.len() == 2 { vec![rows as i64, width as i64] } else { vec![width as i64] };
        one(t.f_reshape(&shape[..])?.f_to_device(a.device())?)
    })
    .host(&[0]))
}
