//! Sets of 8-bit images, written as the field's tools read them: PNG files in a folder or in a zip with EDM's `dataset.json`, and
//! arrays with the channels last (ADM's batches). Files are written as images come: memory does not grow with their number.

use std::io::Write;
use std::path::Path;

use serde_json::json;

use super::{npy, png};
use crate::error::{Context, Error, Result};
use crate::tensor::{DType, HostTensor};

/// 8-bit images [N,C,H,W], part by part; `None` after the last.
pub type Parts<'a> = dyn FnMut() -> Result<Option<HostTensor>> + 'a;

/// `{"labels": [[name, class], ...]}`, as EDM and StyleGAN keep classes.
fn dataset_json(names: &[String], labels: &[usize]) -> Result<Vec<u8>> {
    let pairs: Vec<_> = names.iter().zip(labels).map(|(name, class)| json!([name, class])).collect();
    serde_json::to_vec(&json!({ "labels": pairs })).map_err(|e| Error::io(e.to_string()))
}

/// PNG bytes of each image of a part.
fn pngs(part: &HostTensor) -> Result<Vec<Vec<u8>>> {
    let [_, c, h, w] = *part.shape() else {
        return Err(Error::mismatch(format!("images of shape {:?}, expected [N, C, H, W]", part.shape())));
    };
    part.bytes().chunks_exact(c * h * w).map(|pixels| png::encode_png(pixels, [c, h, w])).collect()
}

/// One PNG an image, `000000.png` and on; `dataset.json` where there are classes.
pub fn folder(path: &Path, labels: Option<&[usize]>, next: &mut Parts<'_>) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| path.display().to_string())?;
    let mut names = Vec::new();
    while let Some(part) = next()? {
        for bytes in pngs(&part)? {
            names.push(format!("{:06}.png", names.len()));
            crate::files::write_atomic(&path.join(&names[names.len() - 1]), &bytes)?;
        }
    }
    match labels {
        Some(labels) => crate::files::write_atomic(&path.join("dataset.json"), &dataset_json(&names, labels)?),
        None => Ok(()),
    }
}

/// A zip as EDM's and StyleGAN's `dataset_tool.py` makes them: PNG files stored as they are, `dataset.json` where there are
/// classes.
pub fn zip(path: &Path, labels: Option<&[usize]>, next: &mut Parts<'_>) -> Result<()> {
    // What a part could not be made for is told as it is, not as trouble of the disk.
    let mut failed = None;
    let written = crate::files::write_atomic_with(path, |file| {
        let mut fill = || -> Result<()> {
            let mut archive = zip::ZipWriter::new(&mut *file);
            let stored = zip::write::FileOptions::default().compression_method(zip::CompressionMethod::Stored);
            let mut add = |name: &str, bytes: &[u8]| -> Result<()> {
                archive.start_file(name, stored).map_err(|e| Error::io(e.to_string()))?;
                Ok(archive.write_all(bytes)?)
            };
            let mut names = Vec::new();
            while let Some(part) = next()? {
                for bytes in pngs(&part)? {
                    let k = names.len();
                    names.push(format!("{:05}/img{k:08}.png", k / 1000));
                    add(&names[k], &bytes)?;
                }
            }
            if let Some(labels) = labels {
                add("dataset.json", &dataset_json(&names, labels)?)?;
            }
            archive.finish().map(|_| ()).map_err(|e| Error::io(e.to_string()))
        };
        fill().map_err(|e| {
            let text = e.to_string();
            failed = Some(e);
            std::io::Error::other(text)
        })
    });
    match failed {
        Some(e) => Err(e.context(format!("cannot write {}", path.display()))),
        None => written,
    }
}

/// All images as one array [N,H,W,C]: a `.npy`, or a `.npz` with `arr_0` and, where there are classes, `arr_1`.
pub fn array(path: &Path, labels: Option<&[usize]>, next: &mut Parts<'_>) -> Result<()> {
    let (mut last, mut size, mut count) = (Vec::new(), [0; 3], 0);
    while let Some(part) = next()? {
        let [n, c, h, w] = *part.shape() else {
            return Err(Error::mismatch(format!("images of shape {:?}, expected [N, C, H, W]", part.shape())));
        };
        for image in part.bytes().chunks_exact(c * h * w) {
            (0..h * w).for_each(|p| last.extend((0..c).map(|channel| image[channel * h * w + p])));
        }
        (size, count) = ([h, w, c], count + n);
    }
    let images = HostTensor::from_bytes(DType::U8, vec![count, size[0], size[1], size[2]], last.into())?;
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy")) {
        return npy::write(path, &images);
    }
    let labels = labels.map(|l| HostTensor::vec(&l.iter().map(|&k| k as i64).collect::<Vec<_>>()));
    let mut arrays = vec![("arr_0", &images)];
    arrays.extend(labels.as_ref().map(|l| ("arr_1", l)));
    npy::write_npz(path, &arrays)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::ImageSet;

    /// What is written comes back: the same pixels, the same classes, in every form.
    #[test]
    fn written_sets_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let pixels: Vec<u8> = (0..7 * 3 * 4 * 5).map(|v| (v * 37 % 256) as u8).collect();
        let images = HostTensor::new(&[7, 3, 4, 5], &pixels).unwrap();
        let labels = [3, 0, 1, 1, 2, 9, 3];
        type Write = fn(&Path, Option<&[usize]>, &mut Parts<'_>) -> Result<()>;
        let forms: [(&str, Write); 4] = [("set", folder), ("set.zip", zip), ("set.npz", array), ("set.npy", array)];
        for (name, write) in forms {
            let mut at = 0;
            let mut next = || {
                let count = 3.min(7 - at);
                at += count;
                (count > 0).then(|| images.rows(at - count, count)).transpose()
            };
            let path = dir.path().join(name);
            write(&path, Some(&labels), &mut next).unwrap();
            let set = ImageSet::open(&path, [-1.0, 1.0]).unwrap();
            assert_eq!((set.len(), set.shape()), (7, [3, 4, 5]), "{name}");
            assert_eq!(set.batch_u8(0, 7).unwrap(), images, "{name}");
            let kept = (!name.ends_with("npy")).then_some(&labels[..]);
            assert_eq!(set.labels(), kept, "{name}");
        }
        // An image that cannot be made leaves no archive.
        let path = dir.path().join("broken.zip");
        let error = zip(&path, None, &mut || Err(Error::mismatch("image 3 holds NaN"))).unwrap_err();
        assert!(error.to_string().contains("image 3 holds NaN") && !path.exists(), "{error}");
    }
}
