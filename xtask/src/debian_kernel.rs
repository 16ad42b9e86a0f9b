//! Debian's kernels: finds or downloads one of each series.
//!
//! Kernels are downloaded as packages from the Debian archive in this machine's apt sources, with separate package
//! lists: the machine's own lists and packages are not changed. The cache is `~/.cache/raven/kernels/<series>/`; delete
//! a folder to get a newer kernel.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use raven_tests::qemu::Kernel;

use crate::progress;

/// A series of kernels to test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Series {
    /// The oldest supported kernel.
    #[value(name = "5.10")]
    V5_10,
    /// The kernel of Debian 12.
    #[value(name = "6.1")]
    V6_1,
    /// The kernel of Debian 13, the first of these with TCX.
    #[value(name = "6.12")]
    V6_12,
    /// The newest kernel in Debian.
    #[value(name = "newest")]
    Newest,
}

impl Series {
    pub(crate) const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    /// Returns archives and suites that may contain the series, in order of preference.
    fn places(self) -> &'static [(Archive, &'static str)] {
        match self {
            Self::V5_10 => &[(Archive::Security, "bullseye-security"), (Archive::Main, "bullseye")],
            Self::V6_1 => &[(Archive::Security, "bookworm-security"), (Archive::Main, "bookworm")],
            Self::V6_12 => &[
                (Archive::Security, "bookworm-security"),
                (Archive::Security, "trixie-security"),
                (Archive::Main, "bookworm-backports trixie"),
            ],
            Self::Newest => &[(Archive::Main, "trixie sid")],
        }
    }

    /// Reports whether a package of this name contains a kernel of this series.
    fn matches(self, package: &str) -> bool {
        let Some(release) = package.strip_prefix("linux-image-").and_then(|p| p.strip_suffix(FLAVOUR)) else {
            return false;
        };
        let numbers: Vec<&str> = release.split(['.', '-', '+']).collect();
        let whole =
            numbers.iter().take(3).filter(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_digit())).count() == 3;
        whole && (self == Self::Newest || release.starts_with(&format!("{}.", self.name())))
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

const FLAVOUR: &str = "-cloud-amd64";

/// Returns a kernel of the series, from the cache or the archive.
pub(crate) fn find_or_fetch(series: Series) -> Result<Kernel> {
    let folder = cache()?.join(series.name());
    if let Some(kernel) = find(&folder) {
        return Ok(kernel);
    }
    progress::step(&format!("downloading kernel {series} into {} (once)", folder.display()));
    let mirrors = mirrors()?;
    let mut reasons = Vec::new();
    for (archive, suites) in series.places() {
        let result = mirrors.of(*archive).and_then(|mirror| fetch(series, &folder, mirror, suites));
        match result {
            Ok(kernel) => return Ok(kernel),
            Err(error) => reasons.push(format!("{suites}: {error:#}")),
        }
    }
    bail!("kernel {series} is not available: {}", reasons.join("; "))
}

fn cache() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    Ok(base.context("neither HOME nor XDG_CACHE_HOME is set")?.join("raven/kernels"))
}

fn find(folder: &Path) -> Option<Kernel> {
    let entries = fs::read_dir(folder.join("lib/modules")).ok()?;
    let release = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).max()?;
    let image = folder.join("vmlinuz");
    image.is_file().then(|| Kernel { release, image, root: folder.to_owned() })
}

fn fetch(series: Series, folder: &Path, mirror: &str, suites: &str) -> Result<Kernel> {
    let beside = folder.with_file_name(format!("{series}.new"));
    let result = fetch_into(&beside, series, folder, mirror, suites);
    let _ = fs::remove_dir_all(&beside);
    result
}

fn fetch_into(beside: &Path, series: Series, folder: &Path, mirror: &str, suites: &str) -> Result<Kernel> {
    let _ = fs::remove_dir_all(beside);
    let apt = Apt::new(&beside.join("apt"), mirror, suites)?;
    apt.run("apt-get", &["update", "-qq"])?;
    let listed = apt.run("apt-cache", &["pkgnames", "linux-image-"])?;
    let newest = listed.lines().filter(|name| series.matches(name)).max_by_key(|name| numbers(name));
    let package = newest.context("the archive lists no such kernel")?;
    let release = package.strip_prefix("linux-image-").context("the package is not a kernel image")?;
    // Newer packages consist of separate packages for image and modules.
    let depends = apt.run("apt-cache", &["depends", "--no-recommends", "--no-suggests", package])?;
    let parts =
        depends.split_whitespace().filter(|word| word.starts_with("linux-") && word.ends_with(&format!("-{release}")));
    let debs = beside.join("debs");
    fs::create_dir_all(&debs)?;
    for part in [package].into_iter().chain(parts) {
        apt.command("apt-get", &["download", "-qq", part]).current_dir(&debs).output().context("start apt-get")?;
    }
    let root = beside.join("root");
    for deb in fs::read_dir(&debs)?.flatten() {
        output_of(Command::new("dpkg-deb").arg("-x").arg(deb.path()).arg(&root))?;
    }
    let modules = |place: &str| root.join(place).join(release);
    let found = ["lib/modules", "usr/lib/modules"].into_iter().map(modules).find(|path| path.join("kernel").is_dir());
    let found = found.with_context(|| format!("{package} contains no modules"))?;
    let images = [root.join("boot").join(format!("vmlinuz-{release}")), found.join("vmlinuz")];
    let image = images.iter().find(|path| path.is_file()).with_context(|| format!("{package} contains no image"))?;
    let done = beside.join("done");
    fs::create_dir_all(done.join("lib/modules"))?;
    fs::rename(image, done.join("vmlinuz"))?;
    fs::rename(&found, done.join("lib/modules").join(release))?;
    let _ = fs::remove_dir_all(folder);
    fs::rename(&done, folder)?;
    find(folder).context("the unpacked kernel is incomplete")
}

/// Returns the numbers in a name for comparison: 6.12.117 is newer than 6.12.99.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Archive {
    Main,
    Security,
}

/// URLs of this machine's Debian mirrors.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mirrors {
    main: Option<String>,
    security: Option<String>,
}

impl Mirrors {
    fn of(&self, archive: Archive) -> Result<&str> {
        let (found, what) = match archive {
            Archive::Main => (&self.main, "Debian's archive"),
            Archive::Security => (&self.security, "Debian's security updates"),
        };
        found.as_deref().with_context(|| format!("this machine's apt sources do not contain {what}"))
    }
}

fn mirrors() -> Result<Mirrors> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|e| e.path()));
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    let mirrors = mirrors_in(&texts.collect::<Vec<_>>().join("\n"));
    ensure!(mirrors != Mirrors::default(), "this machine's apt sources contain no Debian archive");
    Ok(mirrors)
}

/// Parses apt's source files of both formats: URLs that end like those of Debian mirrors.
fn mirrors_in(text: &str) -> Mirrors {
    let mut mirrors = Mirrors::default();
    for line in text.lines().filter(|line| line.starts_with("URIs:") || line.starts_with("deb ")) {
        for word in line.split_whitespace().filter(|word| word.contains("://")) {
            let place = match word.trim_end_matches('/').rsplit('/').next() {
                Some("debian") => &mut mirrors.main,
                Some("debian-security") => &mut mirrors.security,
                _ => continue,
            };
            place.get_or_insert_with(|| word.to_owned());
        }
    }
    mirrors
}

/// Runs apt with separate sources, lists and cache.
struct Apt {
    options: Vec<String>,
}

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

impl Apt {
    fn new(dir: &Path, mirror: &str, suites: &str) -> Result<Self> {
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let source = dir.join("kernel.sources");
        let signed = if Path::new(KEYRING).is_file() { format!("Signed-By: {KEYRING}\n") } else { String::new() };
        fs::write(&source, format!("Types: deb\nURIs: {mirror}\nSuites: {suites}\nComponents: main\n{signed}"))?;
        let dir = dir.display();
        let settings = [
            format!("Dir::Etc::sourcelist={}", source.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            "Acquire::Languages=none".to_owned(),
            // Without it, unavailable lists cause only a warning.
            "APT::Update::Error-Mode=any".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            // The cache is in a home folder, which apt's own user cannot access.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Self { options: settings.into_iter().flat_map(|setting| ["-o".to_owned(), setting]).collect() })
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).args(arguments);
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        output_of(&mut self.command(program, arguments))
    }
}

/// Runs a command and returns its standard output.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.output().with_context(|| format!("start {program}"))?;
    let error = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program}: {}", error.lines().next().unwrap_or("no error message"));
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

// === The machine ===

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_matched_to_series_by_name() {
        for (package, series) in [
            ("linux-image-5.10.0-46-cloud-amd64", Some(Series::V5_10)),
            ("linux-image-6.1.0-56-cloud-amd64", Some(Series::V6_1)),
            ("linux-image-6.12.117+deb12-cloud-amd64", Some(Series::V6_12)),
            ("linux-image-7.2.13+deb14-cloud-amd64", None),
            ("linux-image-6.12-cloud-amd64", None),
            ("linux-image-6.12.117+deb12-cloud-amd64-unsigned", None),
            ("linux-image-6.12.117+deb12-amd64", None),
        ] {
            for each in [Series::V5_10, Series::V6_1, Series::V6_12] {
                assert_eq!(each.matches(package), Some(each) == series, "{package} {each}");
            }
        }
        assert!(Series::Newest.matches("linux-image-7.2.13+deb14-cloud-amd64"));
        assert!(!Series::Newest.matches("linux-image-cloud-amd64"));
        let names = ["linux-image-6.12.99+deb12-cloud-amd64", "linux-image-6.12.117+deb12-cloud-amd64"];
        assert_eq!(names.iter().max_by_key(|name| numbers(name)), Some(&names[1]));
    }

    #[test]
    fn mirrors_are_found_in_both_formats_of_apt_sources() {
        let new =
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: x\n\nURIs: http://mirror.test/debian-security/\n";
        let old = "# deb http://no.test/debian x main\ndeb [arch=amd64] https://old.test/debian/ x main\ndeb https://other.test/things x main\n";
        let (main, security) =
            (Some("http://mirror.test/debian".to_owned()), Some("http://mirror.test/debian-security/".to_owned()));
        assert_eq!(mirrors_in(new), Mirrors { main, security });
        assert_eq!(mirrors_in(old), Mirrors { main: Some("https://old.test/debian/".to_owned()), security: None });
    }
}
