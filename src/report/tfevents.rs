//! TensorBoard event files: records of `length | masked crc of length | Event | masked crc of Event`, little-endian.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::{Context, Result};

/// `tensorflow.Event`, the fields that are written here.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    /// Number of channels.
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded: Vec<u8>,
}

/// CRC-32C (Castagnoli, reflected), as iSCSI and TFRecord use it.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut bit = 0;
            while bit < 8 {
                c = if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0u32, |c, &b| (c >> 8) ^ TABLE[((c ^ u32::from(b)) & 0xff) as usize])
}

/// TFRecord stores crcs masked, so that a crc over data that holds crcs stays useful.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Writes scalars and images for TensorBoard. Events lie on disk after [`EventWriter::flush`] or when it is dropped.
#[derive(Debug)]
pub struct EventWriter {
    out: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new event file in `folder`.
    pub fn create(folder: &Path) -> Result<Self> {
        let seconds = now() as u64;
        // Names carry the time in seconds; two writers within one second must not share a file.
        let path = (0..)
            .map(|k| folder.join(format!("events.out.tfevents.{seconds:010}.disback.{k}")))
            .find(|p| !p.exists())
            .unwrap_or_else(|| folder.join("events.out.tfevents.disback"));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let mut writer = Self { out: BufWriter::new(file), path };
        writer.record(&Event { wall_time: now(), file_version: Some("brain.Event:2".into()), ..Event::default() })?;
        writer.flush()?;
        Ok(writer)
    }

    /// Goes on with the newest event file in `folder`, or starts one. A last record cut short by a kill is dropped.
    pub fn append(folder: &Path) -> Result<Self> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .with_context(|| folder.display().to_string())?
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("events.out.tfevents.")))
            .collect();
        files.sort();
        let Some(path) = files.pop() else { return Self::create(folder) };
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let whole = records(&bytes).last().map_or(0, |(end, _)| *end);
        if whole == 0 {
            return Self::create(folder);
        }
        let open = || -> std::io::Result<File> {
            let file = std::fs::OpenOptions::new().append(true).open(&path)?;
            file.set_len(whole as u64)?;
            Ok(file)
        };
        let file = open().with_context(|| path.display().to_string())?;
        Ok(Self { out: BufWriter::new(file), path })
    }

    /// The file written to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn record(&mut self, event: &Event) -> Result<()> {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut write = || -> std::io::Result<()> {
            self.out.write_all(&length)?;
            self.out.write_all(&masked(&length).to_le_bytes())?;
            self.out.write_all(&data)?;
            self.out.write_all(&masked(&data).to_le_bytes())
        };
        write().with_context(|| self.path.display().to_string())
    }

    fn value(&mut self, step: i64, value: Value) -> Result<()> {
        let summary = Some(Summary { value: vec![value] });
        self.record(&Event { wall_time: now(), step, summary, ..Event::default() })
    }

    /// A number over steps.
    pub fn scalar(&mut self, tag: &str, step: i64, value: f64) -> Result<()> {
        self.value(step, Value { tag: tag.into(), simple_value: Some(value as f32), image: None })
    }

    /// An image over steps: the bytes of a PNG of that height, width and number of channels.
    pub fn image_png(
        &mut self,
        tag: &str,
        step: i64,
        png: &[u8],
        height: usize,
        width: usize,
        channels: usize,
    ) -> Result<()> {
        let image =
            Image { height: height as i32, width: width as i32, colorspace: channels as i32, encoded: png.to_vec() };
        self.value(step, Value { tag: tag.into(), simple_value: None, image: Some(image) })?;
        self.flush()
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().with_context(|| self.path.display().to_string())
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Records with sound crcs: end of the record, its data. Stops at the first broken one.
fn records(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut out = Vec::new();
    let mut at = 0usize;
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?));
    while let Some(length) = bytes.get(at..at + 8) {
        if word(at + 8) != Some(masked(length)) {
            break;
        }
        let size = u64::from_le_bytes(length.try_into().unwrap_or_default()) as usize;
        let Some(data) = (at + 12).checked_add(size).and_then(|end| bytes.get(at + 12..end)) else { break };
        if word(at + 12 + size) != Some(masked(data)) {
            break;
        }
        at += 16 + size;
        out.push((at, data));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_check_value() {
        // The check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa); // RFC 3720, B.4
    }

    fn events(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let found = records(&bytes);
        assert_eq!(found.last().unwrap().0, bytes.len());
        found.iter().map(|(_, data)| Event::decode(*data).unwrap()).collect()
    }

    #[test]
    fn written_events_are_read_back_after_a_torn_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        writer.scalar("loss/fake", 10, 0.25).unwrap();
        writer.image_png("samples", 11, b"png", 2, 3, 1).unwrap();
        let path = writer.path().to_owned();
        drop(writer);
        let mut bytes = std::fs::read(&path).unwrap();
        let whole = bytes.len();
        bytes.extend_from_slice(&bytes.clone()[..20]);
        std::fs::write(&path, &bytes).unwrap();
        let mut writer = EventWriter::append(dir.path()).unwrap();
        assert_eq!(writer.path(), path);
        writer.scalar("loss/fake", 20, 0.5).unwrap();
        drop(writer);
        assert!(std::fs::metadata(&path).unwrap().len() > whole as u64);
        let events = events(&path);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        let value = |k: usize| events[k].summary.as_ref().unwrap().value[0].clone();
        assert_eq!((events[1].step, value(1).tag.as_str(), value(1).simple_value), (10, "loss/fake", Some(0.25)));
        assert_eq!(value(2).image.unwrap(), Image { height: 2, width: 3, colorspace: 1, encoded: b"png".to_vec() });
        assert_eq!((events[3].step, value(3).simple_value), (20, Some(0.5)));
        assert_eq!(events.len(), 4);
    }

    #[test]
    fn nothing_to_go_on_with_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventWriter::append(dir.path()).unwrap();
        let second = EventWriter::create(dir.path()).unwrap();
        assert_ne!(first.path(), second.path());
    }
}
