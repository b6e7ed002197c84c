//! The terminal view, drawn from its state alone, line by line.

use std::collections::VecDeque;

use super::State;

const BOLD: &str = "\x1b[1m";
const REVERSED: &str = "\x1b[7m";
const PLAIN: &str = "\x1b[0m";
const COLOURS: [&str; 4] = ["\x1b[34m", "\x1b[33m", "\x1b[32m", "\x1b[35m"];
const EIGHTHS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Lines of the newest notes.
const NOTES: usize = 3;

/// At most `height` lines of at most `width` visible characters; what does not fit is left out from below, the keys last.
pub fn draw(state: &State, width: usize, height: usize) -> Vec<String> {
    let mut lines = vec![title(state, width), bar(state, width)];
    lines.extend(numbers(state).into_iter().map(|text| cut(&text, width)));
    let notes = state.notes.len().min(NOTES);
    let room = height.saturating_sub(lines.len() + notes + 1);
    lines.extend(curves(state, width, room));
    lines.extend(state.notes.iter().skip(state.notes.len() - notes).map(|n| cut(&format!("  {n}"), width)));
    lines.truncate(height.saturating_sub(1));
    lines.resize(height.saturating_sub(1), String::new());
    let pause = if state.paused { "go on" } else { "pause" };
    let keys = cut(&format!(" c checkpoint   s sample   p {pause}   q stop "), width);
    lines.push(format!("{REVERSED}{keys}{PLAIN}"));
    lines.truncate(height);
    lines
}

/// The first `width` characters; text without colours.
fn cut(text: &str, width: usize) -> String {
    text.chars().take(width).collect()
}

fn title(state: &State, width: usize) -> String {
    let what = match (state.paused, state.stopping) {
        (_, true) => " · stopping",
        (true, _) => " · paused",
        _ => "",
    };
    let stage = if state.stage.is_empty() { "starting" } else { &state.stage };
    format!("{BOLD}{}{PLAIN}", cut(&format!("{} · {stage}{what}", state.run), width))
}

fn bar(state: &State, width: usize) -> String {
    let share = if state.total == 0 { 0.0 } else { (state.iteration as f64 / state.total as f64).clamp(0.0, 1.0) };
    let eta = state.eta().map_or(String::new(), |s| format!("  ETA {}", duration(s)));
    let text = format!(" {}/{}{eta}", state.iteration, state.total);
    let room = width.saturating_sub(text.chars().count());
    let filled = (room as f64 * share).round() as usize;
    cut(&format!("{}{}{text}", "█".repeat(filled), "░".repeat(room - filled)), width)
}

fn numbers(state: &State) -> Vec<String> {
    let number = |v: Option<f64>| v.map_or("-".to_string(), crate::report::text::number);
    let row = state.row.as_ref();
    let of = |f: fn(&crate::distill::metrics::Row) -> String| row.map_or("-".to_string(), f);
    let mut third = format!("memory {}", state.memory.map_or("-".into(), bytes));
    if let Some(device) = state.device_memory {
        third += &format!("   device peak {}", bytes(device));
    }
    third += &format!("   time {}", of(|r| duration(r.seconds)));
    if let Some(last) = state.distance.back() {
        third += &format!("   distance {last:.3}   best {}", number(state.best));
    }
    vec![
        format!(
            "node {}/{}   images/s {}   images {}   lr {}",
            state.node,
            state.nodes,
            of(|r| format!("{:.1}", r.images_per_s)),
            of(|r| r.images.to_string()),
            of(|r| format!("{:.2e}", r.lr))
        ),
        format!(
            "loss {}   generator {}   mismatch {}   skipped {}",
            number(row.and_then(|r| r.loss_fake)),
            number(row.and_then(|r| r.loss_generator)),
            number(row.and_then(|r| r.mismatch)),
            of(|r| r.skipped.to_string())
        ),
        third,
    ]
}

/// Curves of what has been measured, sharing `room` lines.
fn curves(state: &State, width: usize, room: usize) -> Vec<String> {
    let all = [
        ("loss of the fake score", &state.loss_fake),
        ("loss of the generator", &state.loss_generator),
        ("mismatch", &state.mismatch),
        ("distance", &state.distance),
    ];
    let shown: Vec<_> = all.iter().enumerate().filter(|(_, (_, values))| !values.is_empty()).collect();
    if shown.is_empty() {
        return vec![cut("nothing measured yet", width)];
    }
    // A line of text and at least one of curve each.
    let height = (room / shown.len()).saturating_sub(1).min(8);
    if height == 0 {
        return Vec::new();
    }
    let mut lines = Vec::new();
    for (k, (name, values)) in shown {
        let (heights, low, high) = scaled(values, width, height * 8);
        lines.push(cut(&format!("{name}  {low:.4} .. {high:.4}"), width));
        for line in (0..height).rev() {
            let cell = |h: &usize| match h.saturating_sub(line * 8) {
                0 => ' ',
                full @ 8.. => EIGHTHS[full.min(8) - 1],
                part => EIGHTHS[part - 1],
            };
            lines.push(format!("{}{}{PLAIN}", COLOURS[k], heights.iter().map(cell).collect::<String>()));
        }
    }
    lines
}

/// The newest `width` values as heights of 1 to `most`, and their range.
fn scaled(values: &VecDeque<f64>, width: usize, most: usize) -> (Vec<usize>, f64, f64) {
    let last: Vec<f64> = values.iter().skip(values.len().saturating_sub(width)).copied().collect();
    let low = last.iter().copied().fold(f64::INFINITY, f64::min);
    let high = last.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let height = |v: &f64| match high > low {
        true => 1 + ((most - 1) as f64 * (v - low) / (high - low)).round() as usize,
        false => most.div_ceil(2),
    };
    (last.iter().map(height).collect(), low, high)
}

/// `3 h 05 min`, `4 min 10 s`, `12 s`.
fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        3600.. => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        60.. => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{s} s"),
    }
}

fn bytes(n: u64) -> String {
    match n {
        0x4000_0000.. => format!("{:.2} GiB", n as f64 / f64::from(1 << 30)),
        _ => format!("{:.0} MiB", n as f64 / f64::from(1 << 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distill::checkpoint::StageKind;
    use crate::distill::metrics::Row;

    fn row(iteration: u64) -> Row {
        let text = r#"{"stage":"backtrack","iteration":0,"node":0,"loss_fake":null,"loss_generator":null,
            "grad_norm_fake":null,"grad_norm_generator":null,"mismatch":null,"lr":1e-5,"updates":0,"images":0,
            "images_per_s":0,"seconds":0,"skipped":0}"#;
        Row {
            iteration,
            node: 3,
            loss_fake: Some(0.5 / iteration as f64),
            loss_generator: Some(0.25),
            images: iteration * 128,
            images_per_s: 321.5,
            seconds: iteration as f64 * 2.0,
            mismatch: Some(0.0123),
            ..serde_json::from_str::<Row>(text).unwrap()
        }
    }

    /// What a person sees: the lines without their colours.
    fn text(state: &State, width: usize, height: usize) -> String {
        let mut out = String::new();
        for line in draw(state, width, height) {
            let mut visible = String::new();
            let mut rest = line.as_str();
            while let Some(at) = rest.find('\x1b') {
                visible += &rest[..at];
                rest = &rest[at + rest[at..].find('m').unwrap() + 1..];
            }
            visible += rest;
            assert!(visible.chars().count() <= width, "{visible}");
            out += &(visible + "\n");
        }
        assert_eq!(out.lines().count(), height);
        out
    }

    #[test]
    fn the_screen_shows_the_run() {
        let mut state = State { run: "runs/digits".into(), nodes: 5, total: 100, ..State::default() };
        assert!(text(&state, 80, 24).contains("nothing measured yet"));
        for k in 1..=50 {
            state.iteration = k;
            state.row(&row(k));
        }
        state.measured(7.5);
        state.measured(6.25);
        state.note("update 20: target 4 -> 3");
        let shown = text(&state, 110, 40);
        // Fifty iterations at two seconds each are left.
        for part in [
            "runs/digits · backtrack",
            "50/100",
            "ETA 1 min 40 s",
            "node 3/5",
            "321.5",
            "0.0123",
            "distance 6.250",
            "best 6.250",
            "update 20: target 4 -> 3",
            "c checkpoint",
            "p pause",
            "q stop",
            "loss of the fake score  0.0100 .. 0.5000",
            "MiB",
        ] {
            assert!(shown.contains(part), "{part}\n{shown}");
        }
        // The loss falls: its first column is full from top to bottom, its last is the lowest there is.
        let lines: Vec<&str> = shown.lines().collect();
        let at = lines.iter().position(|l| l.starts_with("loss of the fake score")).unwrap();
        let next = lines.iter().position(|l| l.starts_with("loss of the generator")).unwrap();
        assert!(next - at > 2 && lines[at + 1..next].iter().all(|l| l.starts_with('█')), "{shown}");
        assert!(lines[next - 1].trim_end().ends_with('▁'), "{shown}");
        assert_eq!(state.row.as_ref().map(|r| r.stage), Some(StageKind::Backtrack));
        state.paused = true;
        assert!(text(&state, 80, 24).contains("p go on") && text(&state, 80, 24).contains("paused"));
        // Any size is drawn, within its borders.
        for (w, h) in [(1, 1), (10, 3), (40, 8), (300, 90)] {
            text(&state, w, h);
        }
    }

    #[test]
    fn times_and_sizes_are_short() {
        assert_eq!([duration(12.4), duration(250.0), duration(11_100.0)], ["12 s", "4 min 10 s", "3 h 05 min"]);
        assert_eq!([bytes(5 << 20), bytes(3 << 30)], ["5 MiB", "3.00 GiB"]);
    }
}
