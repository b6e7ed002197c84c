//! The pictures of the report: student beside teacher, the trajectory as a film strip, nearest neighbours.

use std::fmt::Write as _;

use super::embed;
use super::run::Run;
use super::text::{esc, number};

/// Widths in pixels at which sheets are embedded.
const LARGE: u32 = 720;
const FRAME: u32 = 360;

pub fn figure(png: Option<&[u8]>, width: u32, caption: &str) -> String {
    let Some(data) = png.and_then(|png| embed::data(png, width)) else { return String::new() };
    let caption = esc(caption);
    format!("<figure><img alt=\"{caption}\" src=\"{data}\"><figcaption>{caption}</figcaption></figure>\n")
}

/// The newest student's sheet and what it is called.
fn newest(run: &Run) -> Option<(Vec<u8>, String)> {
    if let Some(png) = run.sample("student-final.png") {
        let calls = match run.student_calls() {
            1 => "one call".to_string(),
            n => format!("{n} calls"),
        };
        return Some((png, format!("The student, in {calls} of the network")));
    }
    // The path leads from high nodes to the teacher: the lowest node left is the newest student.
    let node = *run.numbered("student-node").first()?;
    Some((run.sample(&format!("student-node-{node:03}.png"))?, format!("The student so far, after node {node}")))
}

/// The names under which student and teacher are shown side by side: file stem and what it is called.
fn both(run: &Run) -> Vec<(String, &'static str)> {
    let newest = match run.sample("student-final.png") {
        Some(_) => Some("student-final".to_string()),
        None => run.numbered("student-node").first().map(|k| format!("student-node-{k:03}")),
    };
    newest.map(|stem| (stem, "student")).into_iter().chain([("teacher".to_string(), "teacher")]).collect()
}

/// Videos as they move, where the samples are videos.
fn moving(run: &Run) -> String {
    let one = |(stem, name): (String, &str)| {
        let data = embed::whole("image/png", &run.sample(&format!("{stem}-moving.png"))?)?;
        Some(format!(
            "<figure><img alt=\"the {name}'s videos\" src=\"{data}\"><figcaption>The {name}'s videos</figcaption></figure>\n"
        ))
    };
    let all: String = both(run).into_iter().filter_map(one).collect();
    if all.is_empty() { all } else { format!("<div class=\"pair\">{all}</div>\n") }
}

/// Samples to listen to, student and teacher from the same noise in a row.
fn sounds(run: &Run) -> String {
    let mut rows = String::new();
    for k in 0..4 {
        let one = |(stem, name): &(String, &str)| {
            let data = embed::whole("audio/wav", &run.sound(&format!("{stem}-{k}.wav"))?)?;
            Some(format!(
                "<figure><audio controls src=\"{data}\"></audio><figcaption>Sample {k}, the {name}</figcaption></figure>\n"
            ))
        };
        let row: String = both(run).iter().filter_map(one).collect();
        if !row.is_empty() {
            let _ = writeln!(rows, "<div class=\"pair\">{row}</div>");
        }
    }
    rows
}

/// Student and teacher from the same noise, side by side, and one over the other under a slider.
pub fn side_by_side(run: &Run) -> String {
    let student = newest(run);
    let teacher = run.sample("teacher.png");
    let mut out = String::new();
    if let Some((png, caption)) = &student {
        out += &figure(Some(png), LARGE, caption);
    }
    out += &figure(
        teacher.as_deref(),
        LARGE,
        "The teacher, by its sampler of many steps, from the same noise and classes",
    );
    if out.is_empty() {
        return out;
    }
    let mut out = format!("<div class=\"pair\">{out}</div>\n");
    out += &moving(run);
    out += &sounds(run);
    // Plots of the student have the teacher beneath them already.
    if run.plotted() {
        return out;
    }
    if let (Some((student, _)), Some(teacher)) = (&student, &teacher)
        && let (Some(over), Some(under)) = (embed::data(student, LARGE), embed::data(teacher, LARGE))
    {
        let _ = write!(
            out,
            "<h3 class=\"one-over\">One over the other</h3>\n<div class=\"overlay\" id=\"wipe\"><img alt=\"teacher\" src=\"{under}\">\
             <img class=\"over\" alt=\"student\" src=\"{over}\"></div>\n<label class=\"control\"><span>student</span>\
             <input type=\"range\" min=\"0\" max=\"100\" value=\"50\" data-wipe=\"wipe\" \
             aria-label=\"how much of the student is shown\"><span>teacher</span></label>\n"
        );
    }
    out
}

/// Node N to node 0, the way the student takes: what the degraded teacher makes, and the student when it left that node.
pub fn film(run: &Run) -> String {
    let mut nodes = run.numbered("degraded-node");
    nodes.extend(run.numbered("student-node"));
    if run.sample("teacher.png").is_some() {
        nodes.push(0);
    }
    nodes.sort_unstable();
    nodes.dedup();
    let (mut strip, mut scenes) = (String::new(), String::new());
    // Half a sheet of images says enough; half a sheet of plots lacks channels.
    let share = if run.plotted() { 1.0 } else { 0.5 };
    for &k in nodes.iter().rev() {
        let recorded = run.nodes.iter().find(|n| n.index == k);
        let title = if k == 0 { "Node 0, the teacher".to_string() } else { format!("Node {k}") };
        let mut about: Vec<String> = Vec::new();
        about.extend(recorded.and_then(|n| n.iteration).map(|i| format!("stage-1 step {i}")));
        about.extend(recorded.and_then(|n| n.loss).map(|l| format!("loss {}", number(l))));
        let teacher = if k == 0 { run.sample("teacher.png") } else { None };
        let degraded = run.sample(&format!("degraded-node-{k:03}.png")).or(teacher);
        let last = if k == 0 { run.sample("student-final.png") } else { None };
        let student = run.sample(&format!("student-node-{k:03}.png")).or(last);
        let target = if k == 0 { "the teacher" } else { "the degraded teacher" };
        let left = if k == 0 { "the student at the end" } else { "the student when it left this node" };
        let missing = student.is_none() && degraded.is_some() && Some(&k) == nodes.last();
        let pictures: String = [(degraded, target), (student, left)]
            .into_iter()
            .map(|(png, caption)| figure(png.and_then(|p| embed::top(&p, share)).as_deref(), FRAME, caption))
            .collect();
        let note = if missing {
            "<p class=\"note\">The path begins here, near the student as it starts out; the fake score starts with this node's weights.</p>"
        } else {
            ""
        };
        let about = esc(&about.join(", "));
        let _ = writeln!(
            strip,
            "<div class=\"frame\"><h3>{title}</h3><p class=\"about\">{about}</p>{pictures}{note}</div>"
        );
        // The slider shows the strip's own pictures, not copies of them.
        let _ = writeln!(scenes, "<option value=\"{}\" label=\"{k}\"></option>", scenes.matches("<option").count());
    }
    if strip.is_empty() {
        return strip;
    }
    let count = nodes.len();
    let slider = match count {
        0 | 1 => String::new(),
        _ => format!(
            "<label class=\"control\"><span>from node {}</span><input type=\"range\" min=\"0\" max=\"{}\" value=\"0\" step=\"1\" \
             list=\"nodes\" data-strip=\"strip\" aria-label=\"node of the trajectory\"><span>to the teacher</span></label>\
             <datalist id=\"nodes\">{scenes}</datalist>\n",
            nodes[count - 1],
            count - 1
        ),
    };
    format!("{slider}<div class=\"strip\" id=\"strip\">{strip}</div>")
}

/// One batch of the first update towards each node, and of the last update of all: is the loss right?
pub fn inside(run: &Run) -> String {
    let mut out = String::new();
    for (name, node, update) in run.inside() {
        let caption = format!(
            "towards node {node}, update {update}; a row a sample: x_t, x0 by the target, x0 by the fake score (where there is \
             one), the generator's gradient (x_t and gradient scaled to their largest value)"
        );
        let png = run.sample(&name).and_then(|png| embed::top(&png, 0.5));
        out += &figure(png.as_deref(), FRAME, &caption);
    }
    if out.is_empty() { out } else { format!("<div class=\"pair\">{out}</div>\n") }
}

/// Generated images with the nearest of the reference.
pub fn neighbours(run: &Run) -> String {
    let sheet = figure(
        run.sample("neighbours.png").as_deref(),
        LARGE,
        "First in each row a generated image, beside it the reference images nearest to it in feature space",
    );
    let Some(rows) = run.evaluation.as_ref().and_then(|e| e["neighbours"].as_array()).filter(|_| !sheet.is_empty())
    else {
        return sheet;
    };
    let nearest: Vec<f64> = rows.iter().filter_map(|r| r["nearest"][0][1].as_f64()).collect();
    let least = nearest.iter().copied().fold(f64::INFINITY, f64::min);
    match nearest.is_empty() {
        true => sheet,
        false => format!(
            "{sheet}<p class=\"note\">Least of these distances: {}. A copy of a reference image would stand at 0.</p>\n",
            number(least)
        ),
    }
}
