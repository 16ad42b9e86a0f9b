//! Features of the running kernel, by its release. Pure, except for [`release`].

use std::{fmt, fs, str::FromStr};

/// A kernel release: the numbers that decisions depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// Major version: 5 in 5.10.114.
    pub major: u32,
    /// Minor version: 10 in 5.10.114.
    pub minor: u32,
    /// Point release: 114 in 5.10.114; 0 where a distribution does not report it.
    pub patch: u32,
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Release {
    type Err = std::num::ParseIntError;

    /// Parses `uname -r`. The text after the third number (`-46-cloud-amd64`, `+deb12u1`) is specific to a
    /// distribution and ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        let mut next = || numbers.next().unwrap_or(Ok(0));
        Ok(Self { major: next()?, minor: next()?, patch: next().unwrap_or(0) })
    }
}

/// The running kernel's release.
pub fn release() -> Result<Release, String> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_err(|e| format!("cannot read /proc/sys/kernel/osrelease: {e}"))?;
    let release: Release =
        text.trim().parse().map_err(|_| format!("kernel release {:?} does not have the form 5.10.0", text.trim()))?;
    let version = fs::read_to_string("/proc/sys/kernel/version").unwrap_or_default();
    Ok(release.with_point_release_of(&version))
}

/// The oldest supported kernel.
pub const FLOOR: Release = Release { major: 5, minor: 10, patch: 0 };

impl Release {
    /// The point release from `uname -v`, where `uname -r` lacks it: Debian's `5.10.0-46-cloud-amd64` is `#1 SMP Debian
    /// 5.10.262-1 (2026-07-31)`. Numbers of another series are ignored.
    fn with_point_release_of(self, version: &str) -> Self {
        let releases =
            version.split_whitespace().filter_map(|word| word.split(['-', '~', '+']).next()?.parse::<Self>().ok());
        releases.filter(|r| (r.major, r.minor) == (self.major, self.minor)).fold(self, Self::max)
    }

    /// A tunnel key has a source (`local_ipv4` of `bpf_tunnel_key`; Linux 5.19, commit 26101f5ab6bd).
    pub fn has_tunnel_source(self) -> bool {
        self >= Release { major: 5, minor: 19, patch: 0 }
    }

    /// TCX, multi-program attachment with links (Linux 6.6, commit e420bed02507).
    pub fn has_tcx(self) -> bool {
        self >= Release { major: 6, minor: 6, patch: 0 }
    }

    /// The kernel's WireGuard accepts a packet with tunnel metadata. Older kernels dereference NULL ("wireguard:
    /// device: check for metadata_dst with skb_valid_dst()", 5.18; 5.17.6, 5.15.37, 5.10.114).
    ///
    /// Distributions number their point releases differently. Where neither `uname -r` nor `uname -v` reports one, it
    /// is 0, which counts as unsafe.
    pub fn wireguard_takes_metadata(self) -> bool {
        match (self.major, self.minor) {
            (5, 10) => self.patch >= 114,
            (5, 15) => self.patch >= 37,
            (5, 17) => self.patch >= 6,
            (major, minor) => (major, minor) >= (5, 18),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(text: &str) -> Release {
        text.parse().expect("a release")
    }

    #[test]
    fn releases_of_all_forms_parse() {
        assert_eq!(release("5.10.0-46-cloud-amd64"), Release { major: 5, minor: 10, patch: 0 });
        assert_eq!(release("6.12.117+deb12-cloud-amd64"), Release { major: 6, minor: 12, patch: 117 });
        assert_eq!(release("6.18.44-fc-v657"), Release { major: 6, minor: 18, patch: 44 });
        assert_eq!(release("7.1"), Release { major: 7, minor: 1, patch: 0 });
        assert!("".parse::<Release>().is_err());
    }

    #[test]
    fn point_release_is_found_in_uname_v() {
        for (name, version, expected) in [
            ("5.10.0-46-cloud-amd64", "#1 SMP Debian 5.10.262-1 (2026-07-31)", "5.10.262"),
            ("6.1.0-56-cloud-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)", "6.1.192"),
            ("6.12.117+deb12-cloud-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1~deb12u1 (2026-11-14)", "6.12.117"),
            ("7.2.13+deb14-cloud-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 7.2.13-1 (2026-11-19)", "7.2.13"),
            // Other distributions report nothing, or another number.
            ("5.10.0-8-generic", "#46~20.04.1-Ubuntu SMP Thu Jul 30 09:44:02 UTC 2026", "5.10.0"),
            ("5.10.114", "#1 SMP 6.1.192 5.10.3", "5.10.114"),
            ("6.18.44-fc-v657", "#1 SMP PREEMPT_DYNAMIC @0", "6.18.44"),
            ("5.10.0-46-cloud-amd64", "", "5.10.0"),
        ] {
            assert_eq!(release(name).with_point_release_of(version), release(expected), "{name} {version}");
        }
        assert!(
            !release("5.10.0-9-amd64")
                .with_point_release_of("#1 SMP Debian 5.10.70-1 (2021-09-30)")
                .wireguard_takes_metadata()
        );
    }

    #[test]
    fn redirect_with_metadata_is_off_where_it_crashes() {
        for (text, safe) in [
            ("5.10.113", false),
            ("5.10.114", true),
            ("5.10.0-8-amd64", false),
            ("5.14.21", false),
            ("5.15.36", false),
            ("5.15.37", true),
            ("5.16.20", false),
            ("5.17.5", false),
            ("5.17.6", true),
            ("5.18.0", true),
            ("6.1.0", true),
        ] {
            assert_eq!(release(text).wireguard_takes_metadata(), safe, "{text}");
        }
    }
}
