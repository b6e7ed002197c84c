//! TensorBoard event files: records of `length | masked crc of length | Event | masked crc of Event`, little-endian.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

mod proto;

use crate::error::{Context, Result};
use proto::{
    Audio, Event, Histogram, HparamsData, Image, Metadata, PluginData, SessionEnd, SessionStart, Summary, Value,
};

pub use proto::Hparam;

/// TFRecord stores crcs masked, so that a crc over data that holds crcs stays useful.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Writes scalars, images, histograms and settings for TensorBoard. Events lie on disk after [`EventWriter::flush`] or when it is dropped.
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
            .find(|p| p.symlink_metadata().is_err())
            .unwrap_or_else(|| folder.join("events.out.tfevents.disback"));
        // (Never through a link that somebody put there.)
        let file = File::create_new(&path).with_context(|| path.display().to_string())?;
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
        let bytes = crate::files::map(&path).with_context(|| path.display().to_string())?;
        let whole = records(&bytes).last().map_or(0, |(end, _)| *end);
        if whole == 0 {
            return Self::create(folder);
        }
        let open = || -> std::io::Result<File> {
            let file = crate::files::append(&path)?;
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
        self.value(step, Value { tag: tag.into(), simple_value: Some(value as f32), ..Value::default() })
    }

    /// The distribution of numbers over steps. What is not finite is left out; nothing is written where nothing is left.
    pub fn histogram(&mut self, tag: &str, step: i64, values: &[f32]) -> Result<()> {
        match Histogram::of(values) {
            Some(histo) => self.value(step, Value { tag: tag.into(), histo: Some(histo), ..Value::default() }),
            None => Ok(()),
        }
    }

    /// The run's settings, for TensorBoard's HPARAMS page; `metrics` are tags of scalars to set beside them.
    pub fn hparams(&mut self, settings: &[(String, Hparam)], metrics: &[&str]) -> Result<()> {
        self.value(0, plugin("_hparams_/experiment", &HparamsData::experiment(settings, metrics)))?;
        let start = SessionStart::new(settings, now());
        let start = HparamsData { session_start: Some(start), ..HparamsData::default() };
        self.value(0, plugin("_hparams_/session_start_info", &start))
    }

    /// The run is over, for the HPARAMS page.
    pub fn hparams_end(&mut self, success: bool) -> Result<()> {
        // STATUS_SUCCESS, STATUS_FAILURE
        let end = SessionEnd { status: if success { 1 } else { 2 }, end_time_secs: now() };
        let end = HparamsData { session_end: Some(end), ..HparamsData::default() };
        self.value(0, plugin("_hparams_/session_end_info", &end))?;
        self.flush()
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
        self.value(step, Value { tag: tag.into(), image: Some(image), ..Value::default() })?;
        self.flush()
    }

    /// Sound over steps: the bytes of a .wav with that many channels and steps of values, `rate` a second.
    pub fn sound_wav(
        &mut self,
        tag: &str,
        step: i64,
        wav: &[u8],
        [channels, steps]: [usize; 2],
        rate: u32,
    ) -> Result<()> {
        let audio = Audio {
            sample_rate: rate as f32,
            num_channels: channels as i64,
            length_frames: steps as i64,
            encoded: wav.to_vec(),
            content_type: "audio/wav".into(),
        };
        self.value(step, Value { tag: tag.into(), audio: Some(audio), ..Value::default() })?;
        self.flush()
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().with_context(|| self.path.display().to_string())
    }
}

/// What the `hparams` plug-in reads under a tag.
fn plugin(tag: &str, data: &HparamsData) -> Value {
    let plugin = PluginData { plugin_name: "hparams".into(), content: data.encode_to_vec() };
    Value {
        tag: tag.into(),
        metadata: Some(Metadata { plugin_data: Some(plugin) }),
        tensor: Some(proto::empty_tensor()),
        ..Value::default()
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

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let victim = dir.path().join("victim");
        // Names of this second and the next ones, so that one of them would be taken.
        let seconds = now() as u64;
        for s in seconds..seconds + 4 {
            let name = format!("events.out.tfevents.{s:010}.disback.0");
            std::os::unix::fs::symlink(&victim, run.join(name)).unwrap();
        }
        let writer = EventWriter::create(&run).unwrap();
        assert!(writer.path().to_string_lossy().ends_with(".disback.1") && !victim.exists());
        std::fs::rename(writer.path(), &victim).unwrap();
        let before = std::fs::read(&victim).unwrap();
        assert!(EventWriter::append(&run).is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), before);
    }

    /// The same events as they were written before the messages were generated: the format must not drift.
    #[test]
    fn the_bytes_are_those_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        writer.flush().unwrap();
        let before = std::fs::metadata(writer.path()).unwrap().len() as usize;
        let event = |step, value| Event {
            wall_time: 1.5,
            step,
            summary: Some(Summary { value: vec![value] }),
            ..Event::default()
        };
        let settings = [
            ("lr".to_string(), Hparam::Number(1e-5)),
            ("objective".to_string(), Hparam::Text("dmd".into())),
            ("tf32".to_string(), Hparam::Flag(false)),
        ];
        let start = SessionStart::new(&settings, 1.5);
        let end = SessionEnd { status: 1, end_time_secs: 2.5 };
        let image = Image { height: 2, width: 3, colorspace: 1, encoded: b"png".to_vec() };
        let numbers = |tag: &str, v| Value { tag: tag.into(), simple_value: Some(v), ..Value::default() };
        for written in [
            Event { wall_time: 1.5, file_version: Some("brain.Event:2".into()), ..Event::default() },
            event(7, numbers("loss", 0.25)),
            event(0, numbers("zero", 0.0)),
            event(8, Value { tag: "sheet".into(), image: Some(image), ..Value::default() }),
            event(9, Value { tag: "w".into(), histo: Histogram::of(&[-1.0, 0.5, 0.5, 3.0]), ..Value::default() }),
            event(0, plugin("_hparams_/experiment", &HparamsData::experiment(&settings, &["evaluate/frechet"]))),
            event(
                0,
                plugin(
                    "_hparams_/session_start_info",
                    &HparamsData { session_start: Some(start), ..HparamsData::default() },
                ),
            ),
            event(
                0,
                plugin("_hparams_/session_end_info", &HparamsData { session_end: Some(end), ..HparamsData::default() }),
            ),
        ] {
            writer.record(&written).unwrap();
        }
        writer.flush().unwrap();
        assert_eq!(std::fs::read(writer.path()).unwrap()[before..], include_bytes!("recorded.bin")[..]);
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

    /// What the `tensorboard` package itself reads of a file.
    #[test]
    fn tensorboard_opens_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        let settings = [
            ("backtrack.lr".to_string(), Hparam::Number(1e-5)),
            ("objective".to_string(), Hparam::Text("dmd".into())),
            ("tf32".to_string(), Hparam::Flag(false)),
        ];
        writer.hparams(&settings, &["evaluate/frechet"]).unwrap();
        for step in 0..3 {
            writer.scalar("evaluate/frechet", step, 8.0 / (step + 1) as f64).unwrap();
        }
        let png = crate::io::images::encode_png(&[9; 12], [3, 2, 2]).unwrap();
        writer.image_png("teacher", 1, &png, 2, 2, 3).unwrap();
        let wav = crate::io::wav::encode(ndarray::array![[0.0f32, 0.5, -0.5]].view(), None, 8000).unwrap();
        writer.sound_wav("sound", 1, &wav, [1, 3], 8000).unwrap();
        let values: Vec<f32> = (0..1000).map(|k| k as f32 / 100.0).chain([f32::NAN]).collect();
        writer.histogram("weights", 2, &values).unwrap();
        writer.histogram("constant", 2, &[3.0; 4]).unwrap();
        writer.histogram("nothing", 2, &[f32::NAN]).unwrap();
        writer.hparams_end(true).unwrap();
        let script = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
acc = EventAccumulator(sys.argv[1], size_guidance={"histograms": 0})
acc.Reload()
tags = acc.Tags()
plugin = {t: acc.SummaryMetadata(t).plugin_data.content for t in acc.PluginTagToContent("hparams")}
start = metadata.parse_session_start_info_plugin_data(plugin["_hparams_/session_start_info"])
end = metadata.parse_session_end_info_plugin_data(plugin["_hparams_/session_end_info"])
experiment = metadata.parse_experiment_plugin_data(plugin["_hparams_/experiment"])
h = acc.Histograms("weights")[0].histogram_value
image = acc.Images("teacher")[0]
sound = acc.Audio("sound")[0]
print(json.dumps(dict(
    scalars=[[e.step, e.value] for e in acc.Scalars("evaluate/frechet")],
    image=[image.step, image.width, image.height, image.encoded_image_string[1:4].decode()],
    sound=[sound.step, sound.sample_rate, sound.length_frames, sound.content_type, sound.encoded_audio_string[:4].decode()],
    histograms=sorted(tags["histograms"]), num=h.num, total=sum(h.bucket), limits=[h.bucket_limit[0], h.bucket_limit[-1]],
    lr=start.hparams["backtrack.lr"].number_value, objective=start.hparams["objective"].string_value,
    infos=[[i.name, i.type] for i in experiment.hparam_infos], metric=experiment.metric_infos[0].name.tag, status=end.status)))
"#;
        let python = std::env::var_os("DISBACK_PYTHON")
            .unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python").into());
        let out = std::process::Command::new(python).arg("-c").arg(script).arg(dir.path()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout).unwrap();
        let got: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(got["scalars"], serde_json::json!([[0, 8.0], [1, 4.0], [2, f64::from(8f32 / 3.0)]]));
        assert_eq!(got["image"], serde_json::json!([1, 2, 2, "PNG"]));
        assert_eq!(got["sound"], serde_json::json!([1, 8000.0, 3, "audio/wav", "RIFF"]));
        assert_eq!(got["histograms"], serde_json::json!(["constant", "weights"]));
        assert_eq!((got["num"].as_f64(), got["total"].as_f64()), (Some(1000.0), Some(1000.0)));
        assert!(got["limits"][0].as_f64() < Some(0.3) && got["limits"][1].as_f64() > Some(9.98), "{got}");
        assert_eq!((got["lr"].as_f64(), got["objective"].as_str()), (Some(1e-5), Some("dmd")));
        assert_eq!(got["infos"], serde_json::json!([["backtrack.lr", 3], ["objective", 1], ["tf32", 2]]));
        assert_eq!((got["metric"].as_str(), got["status"].as_i64()), (Some("evaluate/frechet"), Some(1)));
    }
}
