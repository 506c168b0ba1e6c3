//! `exec-stream`: a program's lines through the exec channel's server to a client that drops them, against the same program
//! writing to a file; what that costs in processor time and memory; and how long a program that does nothing takes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use replank_exec::protocol::CUT_MARK;
use replank_testbed::remains::Scratch;
use replank_testbed::{cleanup, process};
use serde_json::{Map, Value};

use super::exec_client::Channel;
use super::exec_input::{self, BINARY_BYTES, LINES, LINES_FEW, LONG_LINE_BYTES};
use super::exec_server::{self, Server};
use super::{Options, median, round};

/// Interleaved pairs of one run, and repetitions of everything else that takes long; odd, so that a median is one of them.
const PAIRS: usize = 5;
const REPEATS: usize = 3;
/// Enough that the 99th percentile is more than one request.
const NOOPS: usize = 500;
/// Streams at once: as many as the server allows unless told otherwise.
const STREAMS: usize = 4;
/// Where the server cuts a line unless told otherwise.
const LINE_MAX: usize = 64 * 1024;

/// A name of the allowlist whose arguments are not policed: prints the file that is its argument.
const PRINT: &str = "kubectl";
/// Another one, which does nothing.
const NOOP: &str = "elb";

pub(super) fn run(options: &Options, replank: PathBuf) -> Result<ExitCode> {
    cleanup::on_signals()?;
    let scratch = Scratch::create()?;
    let programs = programs(scratch.path())?;
    let server = Server::start(&replank, scratch.path(), &programs)?;
    let mut bench = Bench { server, directory: scratch.path(), programs, peak: 0.0, figures: Map::new() };
    bench.noops()?;
    bench.lines()?;
    bench.long_line()?;
    bench.binary()?;
    bench.streams()?;
    let peak = bench.peak.max(bench.server.memory("VmHWM")?);
    bench.figure("rss_mib", peak);
    let figures = bench.figures;
    if options.json {
        println!("{}", Value::Object(figures));
    } else {
        figures.iter().for_each(|(name, value)| println!("{name:24} {value}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory with the programs that are run.
fn programs(scratch: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    let bin = scratch.join("bin");
    fs::create_dir(&bin)?;
    let print = bin.join(PRINT);
    fs::write(&print, "#!/bin/sh\nexec cat -- \"$1\"\n")?;
    fs::set_permissions(&print, fs::Permissions::from_mode(0o755))?;
    symlink(process::find("true", &[]).context("there is no program called true")?, bin.join(NOOP))?;
    Ok(bin)
}

struct Bench<'a> {
    server: Server,
    directory: &'a Path,
    programs: PathBuf,
    /// The server's memory at its highest, in MiB, up to the last time that the kernel was told to forget it.
    peak: f64,
    figures: Map<String, Value>,
}

impl Bench<'_> {
    fn figure(&mut self, name: &str, value: f64) {
        eprintln!("bench: {name} {value:.3}");
        self.figures.insert(name.to_owned(), round(value).into());
    }

    fn noops(&mut self) -> Result<()> {
        let mut connection = self.server.channel.connect()?;
        let mut took = Vec::new();
        // The first ones find cold caches, and are not counted.
        for number in 0..NOOPS + NOOPS / 10 {
            let begun = Instant::now();
            let outcome = connection.exec(&[NOOP])?;
            let seconds = begun.elapsed().as_secs_f64();
            ensure!(outcome["exit_code"] == 0, "a program that does nothing ended with {outcome}");
            if number >= NOOPS / 10 {
                took.push(seconds * 1_000.0);
            }
        }
        self.figure("noop_p50_ms", median(&mut took));
        // Sorted by now.
        self.figure("noop_p99_ms", took[took.len() * 99 / 100]);
        Ok(())
    }

    /// The main case, and how memory behaves in it: ten times the lines, and again and again, need no more.
    fn lines(&mut self) -> Result<()> {
        let (many, few) = (self.directory.join("lines"), self.directory.join("few-lines"));
        exec_input::lines(&many, LINES)?;
        exec_input::lines(&few, LINES_FEW)?;
        self.figure("rss_idle_mib", self.server.memory("VmRSS")?);
        let (_, _, peak) = self.stream(&few)?;
        self.figure("rss_100k_mib", peak);

        // Once with every event looked at. The others must bring as many bytes.
        let expect = self.checked(&many)?;
        let (mut ours, mut theirs, mut cpu, mut their_cpu, mut peaks) = (vec![], vec![], vec![], vec![], vec![]);
        for pair in 1..=PAIRS {
            let before = self.server.processor_seconds()?;
            let (us, bytes, peak) = self.stream(&many)?;
            cpu.push(self.server.processor_seconds()? - before);
            peaks.push(peak);
            ensure!(bytes == expect, "a stream brought {bytes} bytes instead of {expect}");
            let before = exec_server::processor_seconds_of_children()?;
            let them = self.baseline(&many)?;
            their_cpu.push(exec_server::processor_seconds_of_children()? - before);
            eprintln!("bench: pair {pair} of {PAIRS}: ours {us:.3} s, baseline {them:.3} s");
            ours.push(us);
            theirs.push(them);
        }
        self.figure("rss_first_mib", peaks[0]);
        self.figure("rss_last_mib", peaks[PAIRS - 1]);
        let (us, them) = (median(&mut ours), median(&mut theirs));
        self.figure("lines_per_s", LINES as f64 / us);
        self.figure("ours_s", us);
        self.figure("baseline_s", them);
        self.figure("ratio", us / them);
        self.figure("cpu_s", median(&mut cpu));
        self.figure("baseline_cpu_s", median(&mut their_cpu));
        Ok(())
    }

    /// How long one stream takes, how many bytes it brings, and the server's memory at its highest meanwhile.
    fn stream(&mut self, path: &Path) -> Result<(f64, usize, f64)> {
        self.peak = self.peak.max(self.server.memory("VmHWM")?);
        self.server.forget_peak()?;
        let (seconds, bytes) = timed(|| self.server.channel.discard(&[PRINT, &path.to_string_lossy()]))?;
        Ok((seconds, bytes, self.server.memory("VmHWM")?))
    }

    /// Every line of the file comes as one event. Answers the bytes of all events.
    fn checked(&self, path: &Path) -> Result<usize> {
        let text = fs::read_to_string(path)?;
        let mut lines = text.lines();
        let bytes = self.server.channel.read(&[PRINT, &path.to_string_lossy()], |number, line| {
            ensure!(lines.next() == Some(line), "line {number} came as {line:?}");
            Ok(())
        })?;
        ensure!(lines.next().is_none(), "lines are missing at the end");
        Ok(bytes)
    }

    /// The same program writes to a file. To its end, as a log is written: for a file that is written from its beginning the
    /// kernel would do the copying, and the program nothing.
    fn baseline(&self, path: &Path) -> Result<f64> {
        let out = self.directory.join("baseline");
        let file = File::options().create(true).append(true).open(&out)?;
        let mut command = Command::new(self.programs.join(PRINT));
        command.arg(path).stdin(Stdio::null()).stdout(file);
        let (seconds, status) = timed(|| Ok(command.status()?))?;
        ensure!(status.success(), "the baseline ended with {status}");
        ensure!(fs::metadata(&out)?.len() == fs::metadata(path)?.len(), "the baseline wrote something else");
        fs::remove_file(&out)?;
        Ok(seconds)
    }

    fn long_line(&mut self) -> Result<()> {
        let path = self.directory.join("long-line");
        exec_input::long_line(&path)?;
        let text = path.to_string_lossy();
        let expect = format!("{}{CUT_MARK}", "x".repeat(LINE_MAX));
        let mut took = Vec::new();
        for _ in 0..REPEATS {
            let mut count = 0;
            let (seconds, _) = timed(|| {
                self.server.channel.read(&[PRINT, &text], |_, line| {
                    count += 1;
                    ensure!(line == expect, "a line of {LONG_LINE_BYTES} bytes came as {} bytes", line.len());
                    Ok(())
                })
            })?;
            ensure!(count == 1, "one line came as {count}");
            took.push(seconds);
        }
        fs::remove_file(&path)?;
        self.figure("long_line_s", median(&mut took));
        Ok(())
    }

    fn binary(&mut self) -> Result<()> {
        let path = self.directory.join("binary");
        let ends = exec_input::binary(&path)?;
        let text = path.to_string_lossy().into_owned();
        let mut events = 0;
        let expect = self.server.channel.read(&[PRINT, &text], |_, _| {
            events += 1;
            Ok(())
        })?;
        ensure!(events == ends, "{ends} lines of binary data came as {events} events");
        let mut took = Vec::new();
        for _ in 0..REPEATS {
            let (seconds, bytes) = timed(|| self.server.channel.discard(&[PRINT, &text]))?;
            ensure!(bytes == expect, "the same binary data came as something else");
            took.push(seconds);
        }
        fs::remove_file(&path)?;
        self.figure("binary_mib_per_s", BINARY_BYTES as f64 / f64::from(1 << 20) / median(&mut took));
        Ok(())
    }

    /// Each stream with a client of its own.
    fn streams(&mut self) -> Result<()> {
        let path = self.directory.join("lines").to_string_lossy().into_owned();
        let one = self.server.channel.discard(&[PRINT, &path])?;
        let mut took = Vec::new();
        for _ in 0..REPEATS {
            let (seconds, all) = timed(|| at_once(&self.server.channel, &path))?;
            ensure!(all.iter().all(|bytes| *bytes == one), "streams at once bring something else than one");
            took.push(seconds);
        }
        self.figure("four_streams_lines_per_s", (STREAMS * LINES) as f64 / median(&mut took));
        Ok(())
    }
}

fn at_once(channel: &Channel, path: &str) -> Result<Vec<usize>> {
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..STREAMS).map(|_| scope.spawn(|| channel.discard(&[PRINT, path]))).collect();
        all.into_iter().map(|one| one.join().ok().context("a client panicked")?).collect()
    })
}

fn timed<T>(what: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let begun = Instant::now();
    let made = what()?;
    Ok((begun.elapsed().as_secs_f64(), made))
}
