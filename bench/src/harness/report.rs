//! Writes a run's folder: `results.json`, one SVG for each experiment, `report.md` and
//! `report.html`.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use godwit_types::{Code, CodedError};

use super::plot;
use super::results::{Better, Experiment, Results};
use super::stats::Summary;

/// A run's folder could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file system refused.
    #[error("could not write {path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A value that JSON does not have.
    #[error("could not turn the results into JSON")]
    Json(#[source] serde_json::Error),
    /// A plot could not be drawn.
    #[error("could not draw the plot of {name}: {why}")]
    Plot {
        /// The experiment.
        name: String,
        /// The plotter's words.
        why: String,
    },
}

impl CodedError for WriteError {
    fn code(&self) -> Code {
        match self {
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Code::NoRoom
            }
            Self::File { .. } => Code::Unavailable,
            Self::Json(_) | Self::Plot { .. } => Code::Internal,
        }
    }
}

/// Writes everything into `dir`, which is made if need be.
///
/// # Errors
/// [`WriteError`] naming the file; earlier files may have been written then.
pub fn write(results: &Results, dir: &Path) -> Result<(), WriteError> {
    std::fs::create_dir_all(dir)
        .map_err(|source| WriteError::File { path: dir.to_owned(), source })?;
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|source| WriteError::File { path, source })
    };
    put("results.json", &serde_json::to_string_pretty(results).map_err(WriteError::Json)?)?;
    let mut plots = Vec::new();
    for e in &results.experiments {
        let svg = plot::draw(e).map_err(|why| WriteError::Plot { name: e.name.clone(), why })?;
        if let Some(svg) = &svg {
            put(&format!("{}.svg", e.name), svg)?;
        }
        plots.push(svg);
    }
    for picture in &results.pictures {
        put(&format!("{}.svg", picture.name), &picture.svg)?;
    }
    put("report.md", &markdown(results))?;
    put("report.html", &html(results, &plots))
}

/// A value with the digits that mean something.
pub(super) fn figure(v: f64) -> String {
    let digits = if v == 0.0 { 0 } else { (2 - v.abs().log10().floor() as i32).clamp(0, 3) };
    format!("{v:.*}", usize::try_from(digits).unwrap_or(0))
}

fn verdict(better: Better, s: &Summary, target: Option<f64>) -> String {
    let Some(t) = target else { return String::new() };
    let met = match better {
        Better::Lower => s.median <= t,
        Better::Higher => s.median >= t,
    };
    format!("{} {}", figure(t), if met { "met" } else { "MISSED" })
}

fn header(r: &Results) -> Vec<(&'static str, String)> {
    let m = &r.machine;
    let mut rows = vec![
        ("started", r.started.clone()),
        ("took", format!("{:.0} s{}", r.took_s, if r.quick { " (quick)" } else { "" })),
        ("machine", format!("{}, {} cores, {} MiB", m.cpu, m.cores, m.memory_mib)),
        ("system", format!("{}, Linux {}", m.os, m.kernel)),
        ("build", if m.optimised { "optimised" } else { "NOT optimised" }.to_owned()),
    ];
    let mut more = |k, v: Option<String>| rows.extend(v.map(|v| (k, v)));
    more("qemu", m.qemu.clone());
    more("revision", r.git_rev.clone());
    more("guest", r.guest.clone());
    more("accelerator", r.accel.clone());
    more(
        "link",
        r.link.map(|l| {
            format!(
                "emulated: {} Mbit/s each way, RTT {} ms, jitter {} ms, loss {}, queue {} ms",
                l.rate_mbit, l.rtt_ms, l.jitter_ms, l.loss, l.queue_ms
            )
        }),
    );
    rows
}

fn table(e: &Experiment) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let head = vec!["subject", "n", "median", "min", "max", "MAD", "95 % CI", "target"];
    let rows = e.series.iter().map(|s| match &s.summary {
        Some(m) => vec![
            s.subject.clone(),
            m.n.to_string(),
            figure(m.median),
            figure(m.min),
            figure(m.max),
            figure(m.mad),
            m.ci95.map_or_else(String::new, |[a, b]| format!("{} to {}", figure(a), figure(b))),
            verdict(e.better, m, s.target),
        ],
        None => vec![s.subject.clone(), "0".into()],
    });
    (head, rows.collect())
}

fn comparison_lines(e: &Experiment) -> Vec<String> {
    e.comparisons
        .iter()
        .filter_map(|c| {
            let s = c.summary.as_ref()?;
            Some(format!(
                "{} / {}, round by round: {} ({} to {})",
                c.subject,
                c.against,
                figure(s.median),
                figure(s.min),
                figure(s.max)
            ))
        })
        .collect()
}

fn markdown(r: &Results) -> String {
    let mut t = format!("# {}\n\n", r.suite);
    for (k, v) in header(r) {
        let _ = writeln!(t, "- {k}: {v}");
    }
    for e in &r.experiments {
        let _ = writeln!(t, "\n## {} ({})\n\n{}\n", e.name, e.unit, e.about);
        let (head, rows) = table(e);
        let _ = writeln!(t, "| {} |", head.join(" | "));
        let _ = writeln!(t, "|{}", " --- |".repeat(head.len()));
        for mut row in rows {
            row.resize(head.len(), String::new());
            let _ = writeln!(t, "| {} |", row.join(" | "));
        }
        for line in comparison_lines(e) {
            let _ = writeln!(t, "\n{line}");
        }
        let _ = writeln!(t, "\n![{0}]({0}.svg)", e.name);
    }
    for table in &r.tables {
        let _ = writeln!(t, "\n## {}\n\n{}\n", table.name, table.about);
        let _ = writeln!(t, "| {} |", table.head.join(" | "));
        let _ = writeln!(t, "|{}", " --- |".repeat(table.head.len()));
        for row in &table.rows {
            let _ = writeln!(t, "| {} |", row.join(" | "));
        }
    }
    for p in &r.pictures {
        let _ = writeln!(t, "\n## {0}\n\n{1}\n\n![{0}]({0}.svg)", p.name, p.about);
    }
    if !r.notes.is_empty() {
        let _ = writeln!(t, "\n## Notes\n");
        for n in &r.notes {
            let _ = writeln!(t, "- {n}");
        }
    }
    t
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn html(r: &Results, plots: &[Option<String>]) -> String {
    let title = escape(&r.suite);
    let mut t = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
         <style>body{{font:16px/1.5 sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}}\
         table{{border-collapse:collapse}}td,th{{padding:.2rem .7rem;border-bottom:1px solid #ccc;\
         text-align:right}}td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%}}\
         dt{{float:left;width:8rem;color:#555}}</style>\n<h1>{title}</h1>\n<dl>\n"
    );
    for (k, v) in header(r) {
        let _ = writeln!(t, "<dt>{k}</dt><dd>{}</dd>", escape(&v));
    }
    t.push_str("</dl>\n");
    let cells = |tag: &str, row: &mut dyn Iterator<Item = String>| {
        let inner: String = row.map(|c| format!("<{tag}>{}</{tag}>", escape(&c))).collect();
        format!("<tr>{inner}</tr>\n")
    };
    for (e, plot) in r.experiments.iter().zip(plots) {
        let _ = writeln!(
            t,
            "<h2>{} ({})</h2>\n<p>{}</p>\n<table>",
            escape(&e.name),
            escape(&e.unit),
            escape(&e.about)
        );
        let (head, rows) = table(e);
        t.push_str(&cells("th", &mut head.iter().map(|h| (*h).to_owned())));
        for row in rows {
            t.push_str(&cells("td", &mut row.into_iter()));
        }
        t.push_str("</table>\n");
        for line in comparison_lines(e) {
            let _ = writeln!(t, "<p>{}</p>", escape(&line));
        }
        if let Some(svg) = plot {
            t.push_str(svg);
        }
    }
    for table in &r.tables {
        let (name, about) = (escape(&table.name), escape(&table.about));
        let _ = writeln!(t, "<h2>{name}</h2>\n<p>{about}</p>\n<table>");
        t.push_str(&cells("th", &mut table.head.iter().cloned()));
        for row in &table.rows {
            t.push_str(&cells("td", &mut row.iter().cloned()));
        }
        t.push_str("</table>\n");
    }
    for p in &r.pictures {
        let _ = writeln!(t, "<h2>{}</h2>\n<p>{}</p>\n{}", escape(&p.name), escape(&p.about), p.svg);
    }
    if !r.notes.is_empty() {
        let items: String = r.notes.iter().map(|n| format!("<li>{}</li>\n", escape(n))).collect();
        let _ = write!(t, "<h2>Notes</h2>\n<ul>\n{items}</ul>\n");
    }
    t.push_str("</html>\n");
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{MachineInfo, Picture, SCHEMA, Table};

    #[test]
    fn a_run_is_written_whole_and_read_back() {
        let mut e = Experiment::new("down", "STOP to RESUME", "ms", Better::Lower);
        for v in [40.0, 44.0, 41.0] {
            e.push("godwit <x>", v);
            e.push("stock", 10.0 * v);
        }
        e.target("godwit <x>", 150.0);
        e.finish();
        let results = Results {
            schema: SCHEMA,
            suite: "mainjob".into(),
            started: "2026-01-01T00:00:00Z".into(),
            took_s: 12.0,
            quick: true,
            machine: MachineInfo::here(),
            git_rev: None,
            accel: Some("tcg".into()),
            guest: None,
            link: None,
            experiments: vec![e],
            tables: vec![Table {
                name: "side by side".into(),
                about: "what".into(),
                head: vec!["a".into(), "b".into()],
                rows: vec![vec!["1 <".into(), "2".into()]],
            }],
            pictures: vec![Picture {
                name: "line".into(),
                about: "a line".into(),
                svg: "<svg></svg>".into(),
            }],
            reports: Default::default(),
            notes: vec!["the link is emulated".into()],
        };
        let dir = tempfile::tempdir().expect("a directory");
        write(&results, dir.path()).expect("written");
        let text = |n: &str| std::fs::read_to_string(dir.path().join(n)).expect(n);
        let back: Results = serde_json::from_str(&text("results.json")).expect("parses");
        assert_eq!(text("line.svg"), results.pictures[0].svg);
        let mut told = results.clone();
        told.pictures[0].svg.clear();
        assert_eq!(back, told);
        let md = text("report.md");
        assert!(md.contains("| godwit <x> | 3 | 41.0 | 40.0 | 44.0 | 1.00 |"), "{md}");
        assert!(md.contains("150 met") && md.contains("round by round: 0.100"), "{md}");
        assert!(md.contains("| 1 < | 2 |") && md.contains("![line](line.svg)"), "{md}");
        let html = text("report.html");
        assert!(html.contains("godwit &lt;x&gt;") && html.contains("<td>1 &lt;</td>"), "{html}");
        assert!(text("down.svg").contains("</svg>"));
    }
}
