//! The terminal view, drawn from its state alone.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{LineGauge, Sparkline};

use super::State;

const COLOURS: [Color; 4] = [Color::Blue, Color::Yellow, Color::Green, Color::Magenta];
/// Lines of the newest notes.
const NOTES: usize = 3;
/// Lines of a curve at most.
const CURVE: u16 = 8;

/// Fills the frame; where it is small, the keys stay longest, then what stands above.
pub fn draw(state: &State, frame: &mut Frame) {
    let [mut rest, keys] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
    let pause = if state.paused { "go on" } else { "pause" };
    let text = format!(" c checkpoint   s sample   p {pause}   q stop ");
    frame.render_widget(Line::from(Span::styled(text, Modifier::REVERSED)), keys);
    frame.render_widget(Line::styled(title(state), Modifier::BOLD), top(&mut rest, 1));
    let share = if state.total == 0 { 0.0 } else { (state.iteration as f64 / state.total as f64).clamp(0.0, 1.0) };
    let eta = state.eta().map_or(String::new(), |s| format!("  ETA {}", duration(s)));
    let label = format!("{}/{}{eta}", state.iteration, state.total);
    let gauge = LineGauge::default().ratio(share).label(label).filled_symbol("█").unfilled_symbol("░");
    frame.render_widget(gauge, top(&mut rest, 1));
    let numbers = numbers(state).map(Line::from);
    frame.render_widget(Text::from_iter(numbers), top(&mut rest, 3));
    let notes = state.notes.iter().skip(state.notes.len().saturating_sub(NOTES));
    let notes = Text::from_iter(notes.map(|n| Line::from(format!("  {n}"))));
    let [mut middle, below] =
        Layout::vertical([Constraint::Min(0), Constraint::Length(notes.lines.len() as u16)]).areas(rest);
    frame.render_widget(notes, below);
    curves(state, frame, &mut middle);
}

/// Takes so many lines, as far as there are any, from the top of what is left.
fn top(rest: &mut Rect, lines: u16) -> Rect {
    let taken = Rect { height: lines.min(rest.height), ..*rest };
    rest.y += taken.height;
    rest.height -= taken.height;
    taken
}

fn title(state: &State) -> String {
    let what = match (state.paused, state.stopping) {
        (_, true) => " · stopping",
        (true, _) => " · paused",
        _ => "",
    };
    let stage = if state.stage.is_empty() { "starting" } else { &state.stage };
    format!("{} · {stage}{what}", state.run)
}

fn numbers(state: &State) -> [String; 3] {
    let number = |v: Option<f64>| v.map_or("-".to_string(), crate::report::text::number);
    let row = state.row.as_ref();
    let of = |f: fn(&crate::distill::metrics::MetricsRow) -> String| row.map_or("-".to_string(), f);
    let mut third = format!("memory {}", state.memory.map_or("-".into(), bytes));
    if let Some(device) = state.device_memory {
        third += &format!("   device peak {}", bytes(device));
    }
    third += &format!("   time {}", of(|r| duration(r.seconds)));
    if let Some(last) = state.distance.back() {
        third += &format!("   distance {last:.3}   best {}", number(state.best));
    }
    [
        format!(
            "node {}{}   images/s {}   images {}   lr {}",
            state.node,
            state.nodes.map_or_else(String::new, |last| format!("/{last}")),
            of(|r| format!("{:.1}", r.images_per_s)),
            of(|r| r.images.to_string()),
            of(|r| format!("{:.2e}", r.lr))
        ),
        format!(
            "loss {}   generator {}   mismatch {}   tracking {}   skipped {}",
            number(row.and_then(|r| r.loss_fake)),
            number(row.and_then(|r| r.loss_generator)),
            number(row.and_then(|r| r.mismatch)),
            number(row.and_then(|r| r.tracking)),
            of(|r| r.skipped.to_string())
        ),
        third,
    ]
}

/// Curves of what has been measured, sharing the lines of `rest`.
fn curves(state: &State, frame: &mut Frame, rest: &mut Rect) {
    let all = [
        ("loss of the fake score", &state.loss_fake),
        ("loss of the generator", &state.loss_generator),
        ("mismatch", &state.mismatch),
        ("distance", &state.distance),
    ];
    let shown: Vec<_> = all.iter().zip(COLOURS).filter(|((_, values), _)| !values.is_empty()).collect();
    if shown.is_empty() {
        return frame.render_widget(Line::from("nothing measured yet"), top(rest, 1));
    }
    // A line of text and at least one of curve each.
    let height = (rest.height / shown.len() as u16).saturating_sub(1).min(CURVE);
    if height == 0 {
        return;
    }
    for ((name, values), colour) in shown {
        let most = u64::from(height) * 8;
        let (heights, low, high) = scaled(values, usize::from(rest.width), most);
        frame.render_widget(Line::from(format!("{name}  {low:.4} .. {high:.4}")), top(rest, 1));
        let curve = Sparkline::default().data(heights).max(most).style(Style::new().fg(colour));
        frame.render_widget(curve, top(rest, height));
    }
}

/// The newest `width` values as heights of 1 to `most`, and their range.
fn scaled(values: &VecDeque<f64>, width: usize, most: u64) -> (Vec<u64>, f64, f64) {
    let last: Vec<f64> = values.iter().skip(values.len().saturating_sub(width)).copied().collect();
    let low = last.iter().copied().fold(f64::INFINITY, f64::min);
    let high = last.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let height = |v: &f64| match high > low {
        true => 1 + ((most - 1) as f64 * (v - low) / (high - low)).round() as u64,
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
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::distill::checkpoint::StageKind;
    use crate::distill::metrics::MetricsRow;

    fn row(iteration: u64) -> MetricsRow {
        let text = r#"{"stage":"backtrack","iteration":0,"node":0,"loss_fake":null,"loss_generator":null,
            "grad_norm_fake":null,"grad_norm_generator":null,"mismatch":null,"lr":1e-5,"updates":0,"images":0,
            "images_per_s":0,"seconds":0,"skipped":0}"#;
        MetricsRow {
            iteration,
            node: 3,
            loss_fake: Some(0.5 / iteration as f64),
            loss_generator: Some(0.25),
            images: iteration * 128,
            images_per_s: 321.5,
            seconds: iteration as f64 * 2.0,
            mismatch: Some(0.0123),
            tracking: Some(0.9),
            ..serde_json::from_str::<MetricsRow>(text).unwrap()
        }
    }

    /// What a person sees, line by line.
    fn text(state: &State, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| super::draw(state, frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>() + "\n";
        (0..height).map(line).collect()
    }

    #[test]
    fn the_screen_shows_the_run() {
        let mut state = State { run: "runs/digits".into(), nodes: Some(5), total: 100, ..State::default() };
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
        // The keys and what runs are seen on the smallest screens; any size is drawn.
        let small = text(&state, 20, 5);
        assert!(small.starts_with("runs/digits · backtr") && small.ends_with(" c checkpoint   s sa\n"), "{small}");
        for (w, h) in [(0, 0), (1, 1), (10, 2), (3, 40), (40, 8), (300, 90)] {
            text(&state, w, h);
            text(&State::default(), w, h);
        }
    }

    #[test]
    fn a_screen_of_80_by_24_has_room_for_all() {
        let mut state = State { run: "runs/digits".into(), nodes: Some(5), total: 100, ..State::default() };
        (1..=25).for_each(|k| state.row(&row(k)));
        state.iteration = 25;
        (1..=5).for_each(|k| state.note(format!("note {k}")));
        let shown = text(&state, 80, 24);
        let lines: Vec<&str> = shown.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "runs/digits · backtrack");
        let gauge = lines[1];
        assert!(gauge.starts_with("25/100  ETA 2 min 30 s █") && gauge.ends_with('░'), "{gauge}");
        let (full, rest) = (gauge.matches('█').count(), gauge.matches('░').count());
        assert!(full * 4 >= full + rest - 4 && full * 4 <= full + rest + 4, "{gauge}");
        assert!(lines[2].starts_with("node 3/5   images/s 321.5   images 3200   lr 1.00e-5"), "{shown}");
        assert!(
            lines[3].starts_with("loss 0.02000   generator 0.2500   mismatch 0.01230   tracking 0.9000   skipped 0"),
            "{shown}"
        );
        assert!(
            lines[5].starts_with("loss of the fake score") && lines[20..23] == ["  note 3", "  note 4", "  note 5"]
        );
        assert_eq!(lines[23], " c checkpoint   s sample   p pause   q stop");
    }

    #[test]
    fn times_and_sizes_are_short() {
        assert_eq!([duration(12.4), duration(250.0), duration(11_100.0)], ["12 s", "4 min 10 s", "3 h 05 min"]);
        assert_eq!([bytes(5 << 20), bytes(3 << 30)], ["5 MiB", "3.00 GiB"]);
    }
}
