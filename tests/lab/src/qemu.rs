//! Boots another kernel in QEMU, with a root file system built from this machine's own programs.
//!
//! [`Image`] packs an initramfs: programs with their libraries, kernel modules, and a first process. [`Machine::run`]
//! boots it and returns the console's lines. The machine has no disk, no network and no share with the host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::namespace::output;

/// A kernel on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Release of the kernel, as in `uname -r`.
    pub release: String,
    /// Path of the image that QEMU boots.
    pub image: PathBuf,
    /// Folder that contains `lib/modules/RELEASE`.
    pub root: PathBuf,
}

impl Kernel {
    /// Returns the folder of the kernel's modules.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

// === The root file system ===

/// Module folders and modules that a lab may need, as paths without file name extension.
const MODULES: [&str; 10] = [
    "kernel/net",
    "kernel/crypto",
    "kernel/lib",
    "kernel/arch/x86/crypto",
    "kernel/arch/x86/lib",
    "kernel/drivers/net/wireguard",
    "kernel/drivers/net/vxlan",
    "kernel/drivers/net/veth",
    "kernel/drivers/net/tun",
    "kernel/drivers/net/dummy",
];

/// File name extensions of modules, which are compressed depending on the kernel's build.
const ENDS: [&str; 4] = ["", ".ko", ".ko.xz", ".ko.zst"];

/// An initramfs under construction.
#[derive(Debug, Default)]
pub struct Image {
    /// Entries by absolute path, without the leading slash.
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug)]
enum Entry {
    Folder,
    Link(PathBuf),
    Copy(PathBuf),
    Text(String),
}

impl Image {
    /// Creates an image with the usual folders, and with `/bin`, `/lib`, … as links into `/usr`.
    pub fn new() -> Self {
        let mut image = Self::default();
        for folder in [
            "dev",
            "proc",
            "sys",
            "run",
            "tmp",
            "etc",
            "root",
            "var/lib",
            "usr/bin",
            "usr/sbin",
            "usr/lib",
            "usr/lib64",
        ] {
            image.folder(Path::new(folder));
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            image.entries.insert(name.into(), Entry::Link(Path::new("usr").join(name)));
        }
        image.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n");
        image.text("etc/group", "root:x:0:\n");
        image
    }

    /// Adds a file with the given content.
    pub fn text(&mut self, path: &str, content: &str) {
        self.put(Path::new(path), Entry::Text(content.to_owned()));
    }

    /// Adds a copy of a file.
    pub fn file(&mut self, path: impl AsRef<Path>, from: impl Into<PathBuf>) {
        self.put(path.as_ref(), Entry::Copy(from.into()));
    }

    /// Adds a program and the libraries that it loads.
    pub fn program(&mut self, path: impl AsRef<Path>, from: &Path) -> Result<()> {
        // For a static program ldd prints no library and exits with an error.
        let listed = Command::new("ldd").arg(from).env("LC_ALL", "C").output().context("start ldd")?;
        for library in libraries(&String::from_utf8_lossy(&listed.stdout)) {
            self.file(inside_usr(&library), library);
        }
        self.file(path, from);
        Ok(())
    }

    /// Adds the modules of a kernel that a lab may need, with the index for `modprobe`.
    pub fn modules(&mut self, kernel: &Kernel, scratch: &Path) -> Result<()> {
        let (from, to) = (kernel.modules(), scratch.join("lib/modules").join(&kernel.release));
        for part in MODULES.iter().flat_map(|part| ENDS.map(|end| format!("{part}{end}"))) {
            if from.join(&part).exists() {
                fs::create_dir_all(to.join(&part).parent().context("a module's path has no parent folder")?)?;
                output(Command::new("cp").arg("-r").arg(from.join(&part)).arg(to.join(&part)))?;
            }
        }
        for file in fs::read_dir(&from).with_context(|| format!("read {}", from.display()))?.flatten() {
            if file.file_name().to_string_lossy().starts_with("modules.") {
                fs::copy(file.path(), to.join(file.file_name()))?;
            }
        }
        output(Command::new("depmod").arg("-b").arg(scratch).arg(&kernel.release).env("PATH", with_sbin()))?;
        self.tree(&Path::new("usr/lib/modules").join(&kernel.release), &to)
    }

    fn tree(&mut self, path: &Path, from: &Path) -> Result<()> {
        for entry in fs::read_dir(from)?.flatten() {
            let (inside, outside) = (path.join(entry.file_name()), entry.path());
            if outside.is_dir() { self.tree(&inside, &outside)? } else { self.file(inside, outside) }
        }
        Ok(())
    }

    fn folder(&mut self, path: &Path) {
        self.put(path, Entry::Folder);
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        for folder in path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()) {
            self.entries.entry(folder.to_owned()).or_insert(Entry::Folder);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Writes the archive in cpio's `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst).
    pub fn write(&self, to: &Path) -> Result<()> {
        let mut archive = Archive { file: BufWriter::new(File::create(to)?), inode: 0 };
        // The map is sorted, so a folder comes before its contents.
        for (path, entry) in &self.entries {
            let name = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            match entry {
                Entry::Folder => archive.put(name, 0o040_755, b"")?,
                Entry::Link(target) => archive.put(name, 0o120_777, target.as_os_str().as_encoded_bytes())?,
                Entry::Text(text) => archive.put(name, 0o100_644, text.as_bytes())?,
                Entry::Copy(from) => {
                    let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
                    let mode = fs::metadata(from)?.permissions().mode() & 0o777;
                    archive.put(name, 0o100_000 | mode, &content)?;
                }
            }
        }
        archive.put("TRAILER!!!", 0, b"")?;
        Ok(archive.file.flush()?)
    }
}

struct Archive<W> {
    file: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn put(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len())?;
        let name_size = u32::try_from(name.len() + 1)?;
        // Inode, mode, user, group, links, time, size, four device numbers, size of the name, checksum (none).
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        write!(self.file, "070701")?;
        fields.iter().try_for_each(|field| write!(self.file, "{field:08x}"))?;
        // The header has 110 bytes; name and content are padded to a multiple of four.
        self.file.write_all(name.as_bytes())?;
        self.file.write_all(&[0; 4][..=padding(110 + name.len() + 1)])?;
        self.file.write_all(content)?;
        self.file.write_all(&[0; 3][..padding(content.len())])?;
        Ok(())
    }
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

/// Returns the files in the output of `ldd`: `libc.so.6 => /lib/… (0x…)`, and the loader as a path alone.
pub fn libraries(ldd: &str) -> BTreeSet<PathBuf> {
    let path = |line: &str| {
        let path = line.split_once("=>").map_or(line, |(_, path)| path).split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    ldd.lines().filter_map(path).collect()
}

/// Returns the path in the image of a file in `/lib` or `/usr/lib`; the image has all of them below `/usr`.
fn inside_usr(path: &Path) -> PathBuf {
    let inside = path.strip_prefix("/").unwrap_or(path);
    if inside.starts_with("usr") || !inside.starts_with("lib") && !inside.starts_with("lib64") {
        inside.to_owned()
    } else {
        Path::new("usr").join(inside)
    }
}

fn with_sbin() -> String {
    std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin"
}

// === The machine ===

/// Configuration of a virtual machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Kernel to boot.
    pub kernel: Kernel,
    /// Root file system from [`Image::write`]; `/init` is the first process.
    pub initramfs: PathBuf,
    /// Words for the kernel's command line. `NAME=value` becomes an environment variable of the first process.
    pub words: Vec<String>,
    /// Time limit for the whole run.
    pub deadline: Duration,
    /// Path of the file that receives the console's output.
    pub console: PathBuf,
}

/// Result of a machine that powered itself off.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Time from power-on to power-off.
    pub elapsed: Duration,
    /// `KVM` or `emulation`.
    pub accelerator: &'static str,
}

/// Time without console output after which KVM is considered broken; with KVM a kernel prints within a second.
const KVM_SILENCE: Duration = Duration::from_secs(10);

/// One thread for all processors. With one thread each, QEMU 7.2 may execute a breakpoint that the other
/// processor has just removed from the kernel's code, and the kernel crashes (`Oops: int3`; observed when tcpdump
/// switched a static key).
const EMULATION: &str = "tcg,thread=single";

impl Machine {
    /// Boots the machine, passes each line of the console to `line`, and waits for the power-off. Fails if the machine
    /// does not power itself off before the deadline. Falls back to emulation if KVM does not work.
    pub fn run(&self, mut line: impl FnMut(&str)) -> Result<Ended> {
        if File::options().read(true).write(true).open("/dev/kvm").is_ok()
            && let Some(ended) = self.attempt("kvm", KVM_SILENCE, &mut line)?
        {
            return Ok(ended);
        }
        self.attempt(EMULATION, self.deadline, &mut line)?.context("QEMU ended before the first process printed a line")
    }

    /// Runs the machine with an accelerator. Returns `None` if the first process prints nothing within `silence`.
    fn attempt(&self, accelerator: &str, silence: Duration, line: &mut impl FnMut(&str)) -> Result<Option<Ended>> {
        let start = Instant::now();
        let mut qemu = self.start(accelerator)?;
        let mut console = File::create(&self.console).with_context(|| format!("create {}", self.console.display()))?;
        let lines = follow(qemu.0.stdout.take().context("QEMU has no standard output")?);
        let end = start + self.deadline;
        let mut wait = silence;
        let mut alive = false;
        loop {
            match lines.recv_timeout(wait) {
                Ok(text) => {
                    writeln!(console, "{text}")?;
                    line(&text);
                    // The firmware's output does not count, because the kernel may still fail to start.
                    alive |= text.contains(FIRST_WORDS);
                }
                Err(RecvTimeoutError::Timeout) if !alive => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no power-off within {:?}: killed (console: {})", self.deadline, self.console.display())
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if alive {
                wait = end.saturating_duration_since(Instant::now());
            }
        }
        let status = qemu.0.wait()?;
        if !alive {
            return Ok(None);
        }
        ensure!(status.success(), "QEMU: {status} (console: {})", self.console.display());
        let accelerator = if accelerator == EMULATION { "emulation" } else { "KVM" };
        Ok(Some(Ended { elapsed: start.elapsed(), accelerator }))
    }

    fn start(&self, accelerator: &str) -> Result<Running> {
        // A panic ends the machine. Stall warnings are off, because emulation on a busy machine stalls for seconds.
        let base = "console=ttyS0 panic=-1 oops=panic loglevel=5 random.trust_cpu=on nowatchdog rcupdate.rcu_cpu_stall_suppress=1";
        let command_line = format!("{base} {}", self.words.join(" "));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        command.args(["-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", "2048"]);
        command
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&self.initramfs)
            .arg("-append")
            .arg(command_line);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("start QEMU")?;
        Ok(Running(child))
    }
}

/// Marker in the first process's output. The kernel's output does not count: with a broken KVM it may start partially.
const FIRST_WORDS: &str = "raven-vm:";

/// A running QEMU process; killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the lines of a stream as they arrive, without trailing carriage returns.
fn follow(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut bytes = Vec::new();
        while stream.read_until(b'\n', &mut bytes).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            bytes.clear();
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_parsed_from_the_output_of_ldd() {
        let output = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x0)\n\
                    \tlibnone.so => not found\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(output), BTreeSet::from(expected));
        assert_eq!(libraries("\tnot a dynamic executable\n"), BTreeSet::new());
    }

    #[test]
    fn files_of_lib_are_placed_in_usr_lib_of_the_image() {
        for (outside, inside) in [
            ("/lib/x86_64-linux-gnu/libc.so.6", "usr/lib/x86_64-linux-gnu/libc.so.6"),
            ("/lib64/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2"),
            ("/usr/lib/libx.so", "usr/lib/libx.so"),
            ("/opt/lib/liby.so", "opt/lib/liby.so"),
        ] {
            assert_eq!(inside_usr(Path::new(outside)), Path::new(inside));
        }
    }

    #[test]
    fn archive_entries_have_110_byte_headers_and_four_byte_padding() {
        let mut archive = Archive { file: Vec::new(), inode: 0 };
        archive.put("ab", 0o100_644, b"12345").expect("written");
        archive.put("TRAILER!!!", 0, b"").expect("written");
        let bytes = archive.file;
        assert!(bytes.starts_with(b"07070100000001000081a4"));
        assert_eq!(&bytes[110..113], b"ab\0");
        let content = 116;
        assert_eq!(&bytes[content..content + 8], b"12345\0\0\0");
        assert_eq!(&bytes[content + 8..content + 14], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
