//! The teacher's folder: which network it holds, what lies beside it, and which pipeline runs the student.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::scheduler::{Schedulers, Scheduling};
use super::{Framework, part_of_diffusers};
use crate::diffusion::{Condition, TeacherCard, TimeUnit};
use crate::error::{Context, Error, Result};
use crate::files;

/// Networks of diffusers that are known, by what their pipelines do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Unet2D,
    Unet2DCondition,
    DiT,
    PixArt,
    Sd3,
    Flux,
}

const FAMILIES: [(&str, Family); 6] = [
    ("UNet2DModel", Family::Unet2D),
    ("UNet2DConditionModel", Family::Unet2DCondition),
    ("DiTTransformer2DModel", Family::DiT),
    ("PixArtTransformer2DModel", Family::PixArt),
    ("SD3Transformer2DModel", Family::Sd3),
    ("FluxTransformer2DModel", Family::Flux),
];

/// The pipeline of pixels that passes class labels on, scales noise and input as its scheduler says, and makes one step unless told
/// otherwise.
const OF_PIXELS: &str = "ConsistencyModelPipeline";

/// Weight files of a network begin so.
const WEIGHTS: &str = "diffusion_pytorch_model";

/// The teacher's folder, read.
#[derive(Debug)]
pub(super) struct PipelineFolder {
    root: PathBuf,
    network: PathBuf,
    part: &'static str,
    index: Option<Json>,
    config: Json,
    family: Family,
}

impl PipelineFolder {
    /// Reads `model_index.json` and the network's `config.json`.
    ///
    /// Errors: a folder without a network; a network of a class that is not known.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |file: PathBuf| -> Result<Option<Json>> {
            if !file.is_file() {
                return Ok(None);
            }
            let text = files::read_text(&file, files::SETTINGS)?;
            let value = serde_json::from_str(&text).map_err(|e| Error::usage(format!("not JSON: {e}")));
            value.map(Some).with_context(|| file.display().to_string())
        };
        if !path.is_dir() {
            let what = if path.exists() { "a file, expected a folder" } else { "no such folder" };
            return Err(Error::usage(format!("--pipeline {}: {what}", path.display()))
                .hint("give the folder that the teacher was converted from"));
        }
        let index = read(path.join("model_index.json"))?;
        let parts = ["unet", "transformer"];
        let inside = parts.into_iter().find(|p| path.join(p).join("config.json").is_file());
        let network = inside.map_or(path.to_owned(), |p| path.join(p));
        let config = read(network.join("config.json"))?;
        let class = config.as_ref().and_then(|c| c["_class_name"].as_str());
        let (Some(config), Some(class)) = (&config, class) else {
            return Err(Error::usage(format!(
                "--pipeline {}: no unet/config.json, transformer/config.json or config.json that names its _class_name",
                path.display()
            ))
            .hint("give the folder of the pipeline that the teacher was converted from"));
        };
        let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == class) else {
            let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
            return Err(Error::unsupported(format!(
                "{}: the network {class} is not known; known are {}",
                network.join("config.json").display(),
                known.join(", ")
            ))
            .hint("--format safetensors writes the weights under the framework's names, for the network's own code"));
        };
        let of_class = if matches!(family, Family::Unet2D | Family::Unet2DCondition) { parts[0] } else { parts[1] };
        Ok(Self {
            root: path.to_owned(),
            part: inside.unwrap_or(of_class),
            config: config.clone(),
            family: *family,
            network,
            index,
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The network's own configuration.
    pub fn config(&self) -> &Json {
        &self.config
    }

    /// `unet` or `transformer`.
    pub fn part(&self) -> &'static str {
        self.part
    }

    pub fn family(&self) -> Family {
        self.family
    }

    fn refuse<T>(&self, what: &str, hint: &str) -> Result<T> {
        Err(Error::usage(format!("--pipeline {}: {what}", self.root.display())).hint(hint))
    }

    /// Names of the parts beside network and scheduler that `model_index.json` lists.
    fn listed(&self) -> Vec<&str> {
        let entries = self.index.as_ref().and_then(Json::as_object).into_iter().flatten();
        entries
            .filter(|(name, part)| {
                let held = part.as_array().and_then(|p| p.first()).is_some_and(Json::is_string);
                held && name.as_str() != self.part && name.as_str() != "scheduler"
            })
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// The class of the pipeline that runs the student with this scheduler.
    ///
    /// Errors: none does.
    pub fn pipeline(&self, scheduling: &Scheduling, card: &TeacherCard) -> Result<String> {
        let named = self.index.as_ref().and_then(|i| i["_class_name"].as_str());
        let scheduler = scheduling.class;
        let no = |pipeline: &str| {
            Err(Error::unsupported(format!("{pipeline} of diffusers does not run {scheduler}, which this card needs"))
                .hint("student.onnx runs without diffusers; --format safetensors writes the weights alone"))
        };
        if self.family == Family::Unet2D {
            if !self.listed().is_empty() {
                return self.refuse(
                    &format!("a UNet2DModel with {} beside it, expected one of pixels", self.listed().join(", ")),
                    "student.onnx runs without diffusers; --format safetensors writes the weights alone",
                );
            }
            let square = self.config["sample_size"].is_u64();
            return match scheduling.kind {
                Schedulers::Flow if card.conditions.is_empty() => Ok("DDPMPipeline".into()),
                Schedulers::Flow => no("no pipeline of classes in pixels"),
                Schedulers::Vp | Schedulers::Edm | Schedulers::Consistency if square => Ok(OF_PIXELS.into()),
                _ => self.refuse(
                    &format!(
                        "unet/config.json has sample_size {}, but {OF_PIXELS} makes squares",
                        self.config["sample_size"]
                    ),
                    "student.onnx runs without diffusers",
                ),
            };
        }
        let Some(named) = named else {
            return self.refuse(
                "no model_index.json, so that its pipeline is unknown",
                "give the folder of the whole pipeline: the network alone is enough for UNet2DModel only",
            );
        };
        let runs = match (self.family, scheduling.kind) {
            (Family::Unet2DCondition, Schedulers::Edm) => named.starts_with("StableDiffusion"),
            (Family::Sd3 | Family::Flux, kind) => kind == Schedulers::Flow,
            (_, kind) => kind == Schedulers::Vp,
        };
        if !runs {
            return no(named);
        }
        let unit = if self.family == Family::Flux { TimeUnit::Unit } else { TimeUnit::Thousand };
        if scheduling.kind == Schedulers::Flow && card.time_unit != unit {
            return Err(Error::unsupported(format!(
                "{named} gives its network the time as {}, and the card says time_unit {:?}",
                if unit == TimeUnit::Unit { "`unit`" } else { "`thousand`" },
                card.time_unit
            ))
            .hint("student.onnx runs without diffusers"));
        }
        Ok(named.to_owned())
    }

    /// The folders to link beside the network.
    ///
    /// Errors: one that the pipeline lists is not there, or holds no ONNX file for optimum.
    pub fn parts(&self, framework: Framework) -> Result<Vec<String>> {
        let mut parts: Vec<String> = self.listed().into_iter().map(String::from).collect();
        if framework == Framework::Optimum {
            // Its VAE is in two parts, its text encoders are ONNX, and other networks it does not load.
            let has_vae = parts.iter().any(|p| p == "vae");
            parts.retain(|p| {
                ["text_encoder", "tokenizer", "feature_extractor"].iter().any(|known| p.starts_with(known))
            });
            if has_vae || self.root.join("vae_decoder").is_dir() {
                parts.push("vae_decoder".into());
            }
            if self.root.join("vae_encoder").is_dir() {
                parts.push("vae_encoder".into());
            }
            let onnx = |p: &str| p.starts_with("text_encoder") || p.starts_with("vae_");
            if let Some(part) = parts.iter().find(|p| onnx(p) && !self.root.join(p).join("model.onnx").is_file()) {
                return self.refuse(
                    &format!("no {part}/model.onnx"),
                    "give the folder that `optimum-cli export onnx --model TEACHER FOLDER` made: its VAE and text encoders are linked",
                );
            }
        }
        match parts.iter().find(|p| !self.root.join(p).is_dir()) {
            Some(part) => self.refuse(
                &format!("model_index.json lists `{part}`, and there is no such folder"),
                "give the whole pipeline, or set the part to [null, null] in model_index.json where it has none",
            ),
            None => Ok(parts),
        }
    }

    /// `model_index.json` of the student.
    pub fn index(&self, pipeline: &str, scheduler: &str) -> Json {
        let mut index = self.index.as_ref().and_then(Json::as_object).cloned().unwrap_or_default();
        index.remove("_name_or_path");
        index.insert("_class_name".into(), pipeline.into());
        index.entry("_diffusers_version").or_insert_with(|| self.config["_diffusers_version"].clone());
        let class = self.config["_class_name"].as_str().unwrap_or_default();
        index.entry(self.part).or_insert_with(|| part_of_diffusers(class));
        index.insert("scheduler".into(), part_of_diffusers(scheduler));
        Json::Object(index)
    }

    /// The network's safetensors files: one, its shards, or those of a variant (fp16) where there are no others.
    ///
    /// Errors: there are none.
    pub fn weights(&self) -> Result<Vec<PathBuf>> {
        let mut found: Vec<(String, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&self.network).with_context(|| self.network.display().to_string())? {
            let entry = entry.with_context(|| self.network.display().to_string())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(rest) = name.strip_prefix(WEIGHTS).and_then(|r| r.strip_suffix(".safetensors")) {
                found.push((rest.to_owned(), entry.path()));
            }
        }
        found.sort();
        // `` alone, `-00001-of-00002`, `.fp16`, `.fp16-00001-of-00002`.
        let variant = |rest: &str| rest.split('-').next().unwrap_or_default().to_owned();
        let Some(chosen) = found.first().map(|(rest, _)| variant(rest)) else {
            return self.refuse(
                &format!("no {}/{WEIGHTS}*.safetensors", self.part),
                "save it anew from diffusers, which writes them: pipe.save_pretrained(folder)",
            );
        };
        let whole = found.iter().any(|(rest, _)| *rest == chosen);
        let wanted = |rest: &str| if whole { rest == chosen } else { variant(rest) == chosen };
        Ok(found.into_iter().filter(|(rest, _)| wanted(rest)).map(|(_, path)| path).collect())
    }

    /// Conditions that the card has and that this network's pipeline does not give.
    pub fn not_given<'a>(&self, card: &'a TeacherCard) -> Option<(&'a String, &'a Condition)> {
        let given: &[&str] = match self.family {
            Family::Unet2DCondition => &["encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"],
            _ => &["encoder_hidden_states", "pooled_projections"],
        };
        card.conditions.iter().find(|(name, _)| !given.contains(&name.as_str()))
    }
}
