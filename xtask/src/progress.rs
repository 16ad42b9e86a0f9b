//! Progress of xtask on standard error: one line per step with the elapsed time. Output of other programs goes to
//! a log file.
//!
//! Standard output is left to results, which may be JSON.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
    process::Command,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Error, Result, ensure};

use crate::target_dir;

/// Interval of the status lines while steps run.
const INTERVAL: Duration = Duration::from_secs(30);
/// Bytes of the log that an error shows.
const TAIL: u64 = 3000;

static START: OnceLock<Instant> = OnceLock::new();
static COMMAND: OnceLock<String> = OnceLock::new();
static LOGGED: AtomicBool = AtomicBool::new(false);

/// Starts the clock. `command` becomes the name of the log file.
pub(crate) fn init(command: &str) {
    let _ = START.set(Instant::now());
    let _ = COMMAND.set(command.to_owned());
}

/// Prints a line with the elapsed time.
pub(crate) fn step(text: &str) {
    // Without a reader of standard error, the command continues.
    let _ = writeln!(io::stderr(), "{} {text}", elapsed());
}

/// Returns the elapsed time as a prefix of a line, such as `[ 12 s]`.
pub(crate) fn elapsed() -> String {
    format!("[{:>4} s]", START.get_or_init(Instant::now).elapsed().as_secs())
}

/// Prints the path of the log file if something was logged.
pub(crate) fn finish() {
    if LOGGED.load(Ordering::Relaxed) {
        step(&format!("details: {}", log_path().display()));
    }
}

/// Returns the path of the log file.
fn log_path() -> PathBuf {
    target_dir().join("xtask").join(format!("{}.log", COMMAND.get().map_or("xtask", String::as_str)))
}

/// Opens the log file; empties it at the first call.
fn log() -> Result<File> {
    static OPEN: Mutex<()> = Mutex::new(());
    let _guard = locked(&OPEN);
    let path = log_path();
    fs::create_dir_all(path.parent().context("the log file has no folder")?)?;
    let first = !LOGGED.swap(true, Ordering::Relaxed);
    let file = OpenOptions::new().create(true).append(!first).write(true).truncate(first).open(&path);
    file.with_context(|| format!("open {}", path.display()))
}

/// Runs a command as a step of its own.
pub(crate) fn run(text: &str, command: &mut Command) -> Result<()> {
    step(text);
    logged(command)
}

/// Runs a command with its output in the log file. The error contains the end of the log.
pub(crate) fn logged(command: &mut Command) -> Result<()> {
    let mut file = log()?;
    writeln!(file, "{} {command:?}", elapsed())?;
    // Appending, so that concurrent commands do not overwrite each other.
    let file = OpenOptions::new().append(true).open(log_path())?;
    let begin = file.metadata()?.len();
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file).status();
    let status = status.with_context(|| format!("start {program}"))?;
    ensure!(status.success(), "{program}: {status}; the end of {}:\n{}", log_path().display(), tail(begin));
    Ok(())
}

fn tail(begin: u64) -> String {
    let read = || -> Result<String> {
        let mut file = File::open(log_path())?;
        file.seek(SeekFrom::Start(begin.max(file.metadata()?.len().saturating_sub(TAIL))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    };
    read().unwrap_or_else(|error| format!("(cannot read the log: {error:#})"))
}

type Work = Box<dyn FnOnce(&Reporter<'_>) -> Result<()> + Send>;

/// A step that can run concurrently with others.
pub(crate) struct Task {
    name: String,
    work: Work,
}

impl Task {
    /// Creates a task. `work` reports details through its argument.
    pub(crate) fn new(
        name: impl Into<String>,
        work: impl FnOnce(&Reporter<'_>) -> Result<()> + Send + 'static,
    ) -> Self {
        Self { name: name.into(), work: Box::new(work) }
    }
}

/// Receives details of a running task for the status line.
pub(crate) struct Reporter<'a> {
    name: &'a str,
    status: &'a Mutex<Status>,
}

impl Reporter<'_> {
    /// Sets the detail that the status line shows for the task.
    pub(crate) fn detail(&self, text: &str) {
        locked(self.status).running.insert(self.name.to_owned(), text.to_owned());
    }
}

/// State of concurrent tasks.
struct Status {
    /// Running tasks with their latest detail.
    running: BTreeMap<String, String>,
    left: usize,
    total: usize,
}

impl Status {
    /// Describes what runs and how much is left.
    fn line(&self) -> String {
        let with_detail = |(name, detail): (&String, &String)| {
            if detail.is_empty() { name.clone() } else { format!("{name} ({detail})") }
        };
        let running: Vec<String> = self.running.iter().map(with_detail).collect();
        format!("{} of {} steps left; running: {}", self.left, self.total, running.join("; "))
    }
}

/// Runs lanes of tasks in parallel; the tasks of one lane run in their order. After a failure, a lane ends and the
/// other lanes complete. Returns the first error.
pub(crate) fn parallel(lanes: Vec<Vec<Task>>) -> Result<()> {
    let total = lanes.iter().map(Vec::len).sum();
    if total == 0 {
        return Ok(());
    }
    let status = Mutex::new(Status { running: BTreeMap::new(), left: total, total });
    let errors = Mutex::new(Vec::<Error>::new());
    thread::scope(|scope| {
        let (done, wait) = channel::<()>();
        for lane in lanes {
            let (done, status, errors) = (done.clone(), &status, &errors);
            scope.spawn(move || {
                for task in lane {
                    if let Err(error) = run_task(task, status) {
                        locked(errors).push(error);
                        break;
                    }
                }
                drop(done);
            });
        }
        drop(done);
        while wait.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            step(&locked(&status).line());
        }
    });
    match errors.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().next() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn run_task(task: Task, status: &Mutex<Status>) -> Result<()> {
    let begin = Instant::now();
    step(&task.name);
    locked(status).running.insert(task.name.clone(), String::new());
    let result = (task.work)(&Reporter { name: &task.name, status });
    let mut status = locked(status);
    status.running.remove(&task.name);
    status.left -= 1;
    let seconds = begin.elapsed().as_secs();
    match &result {
        Ok(()) if status.running.is_empty() => step(&format!("done: {} ({seconds} s)", task.name)),
        Ok(()) => step(&format!("done: {} ({seconds} s); {}", task.name, status.line())),
        Err(_) => step(&format!("FAILED: {} ({seconds} s)", task.name)),
    }
    drop(status);
    result.with_context(|| task.name)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parallel_runs_all_lanes_and_returns_the_error() {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let count = || {
            Task::new("count", |_| {
                COUNT.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
        };
        let fail = || Task::new("fail", |_| anyhow::bail!("no reason"));
        parallel(vec![vec![count(), count()], vec![count()]]).expect("no task fails");
        assert_eq!(COUNT.load(Ordering::Relaxed), 3);
        let error = parallel(vec![vec![fail(), count()], vec![count()]]).expect_err("a task fails");
        assert_eq!((format!("{error:#}").as_str(), COUNT.load(Ordering::Relaxed)), ("fail: no reason", 4));
    }

    #[test]
    fn status_line_shows_running_tasks_and_the_rest() {
        let running = BTreeMap::from([("a".to_owned(), String::new()), ("b".to_owned(), "3 of 5 packages".to_owned())]);
        let status = Status { running, left: 3, total: 4 };
        assert_eq!(status.line(), "3 of 4 steps left; running: a; b (3 of 5 packages)");
    }
}
