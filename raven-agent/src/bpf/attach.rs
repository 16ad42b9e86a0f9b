//! Attaches programs so that they outlive the agent, and replaces them without a gap.
//!
//! TCX (Linux 6.6) and XDP have links, which are pinned by program and device and updated in place. Older kernels have
//! TC filters, which persist by themselves; Raven's have a fixed priority and handle, by which they are replaced.

use std::{fs, mem, path::PathBuf};

use aya::programs::{
    LinkOrder, ProgramError, ProgramInfo, SchedClassifier, TcAttachType, Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    loaded_programs,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};

use super::{Action, Bpf, Error};
use crate::{names, state::Change};

/// Any of aya's errors; shown by [`chain`].
type AyaError = Box<dyn std::error::Error + Send + Sync>;

/// The hook of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// TC egress of `raven0`.
    OverlayEgress,
    /// TC ingress of `raven0`.
    OverlayIngress,
    /// Native XDP of the uplink.
    UplinkXdp,
    /// TC ingress of the uplink.
    UplinkIngress,
    /// TC ingress of `raven-wg0`.
    TunnelIngress,
    /// TC egress of `raven-wg0`.
    TunnelEgress,
}

impl Hook {
    /// All hooks.
    pub const ALL: [Self; 6] = [
        Self::OverlayEgress,
        Self::OverlayIngress,
        Self::UplinkXdp,
        Self::UplinkIngress,
        Self::TunnelIngress,
        Self::TunnelEgress,
    ];

    /// Name of the program in the object, in `bpftool` and in pins.
    pub fn program(self) -> &'static str {
        match self {
            Self::OverlayEgress => "overlay_egress",
            Self::OverlayIngress => "overlay_ingress",
            Self::UplinkXdp => "uplink_xdp",
            Self::UplinkIngress => "uplink_ingress",
            Self::TunnelIngress => "tunnel_ingress",
            Self::TunnelEgress => "tunnel_egress",
        }
    }

    /// True for TC egress.
    pub fn is_egress(self) -> bool {
        matches!(self, Self::OverlayEgress | Self::TunnelEgress)
    }

    fn direction(self) -> TcAttachType {
        if self.is_egress() { TcAttachType::Egress } else { TcAttachType::Ingress }
    }
}

impl Bpf {
    /// Ensures that the program of `hook` is attached to the device. It stays on others, see [`Bpf::detach_except`].
    pub fn attach(&mut self, hook: Hook, device: &str, ifindex: u32) -> Result<Change, Error> {
        self.load(hook)?;
        let failed = |reason: String| Error::Program {
            action: Action::Attach,
            program: hook.program(),
            place: format!(" to {device}"),
            reason,
        };
        if hook != Hook::UplinkXdp && !self.tcx {
            let change = self.attach_filter(hook, device).map_err(|e| failed(chain(&e)))?;
            // An agent with other settings may have left a link.
            self.detach(hook);
            return Ok(change);
        }
        let path = self.pin(hook, ifindex);
        if let Ok(pinned) = PinnedLink::from_pin(&path) {
            match self.update(hook, pinned) {
                Ok(change) => return Ok(change),
                Err(e) if !is_stale(e.as_ref()) => return Err(failed(chain(e.as_ref()))),
                Err(_) => fs::remove_file(&path)
                    .map_err(|e| failed(format!("cannot remove the stale link {}: {e}", path.display())))?,
            }
        }
        let link = self.create(hook, device, ifindex).map_err(|e| failed(chain(e.as_ref())))?;
        link.pin(&path).map_err(|e| failed(format!("cannot pin the link at {}: {e}", path.display())))?;
        if hook != Hook::UplinkXdp {
            detach_filter(hook, device);
        }
        Ok(Change::ONE)
    }

    /// Detaches the program of `hook` from every device.
    pub fn detach(&mut self, hook: Hook) {
        self.detach_except(hook, []);
    }

    /// Detaches the program of `hook` from every device that is not among these. A recreated device has another index, and
    /// its old link is stale.
    pub fn detach_except(&mut self, hook: Hook, keep: impl IntoIterator<Item = u32>) {
        let keep: Vec<PathBuf> = keep.into_iter().map(|ifindex| self.pin(hook, ifindex)).collect();
        let Ok(entries) = fs::read_dir(self.pins.join("links")) else { return };
        for path in entries.flatten().map(|e| e.path()).filter(|path| !keep.contains(path)) {
            let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.rsplit_once('-'));
            if name.is_some_and(|(program, _)| program == hook.program()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// True if the program is pinned to a device.
    pub fn is_attached(&self, hook: Hook, ifindex: u32) -> bool {
        self.pin(hook, ifindex).exists()
    }

    fn pin(&self, hook: Hook, ifindex: u32) -> PathBuf {
        self.pins.join("links").join(format!("{}-{ifindex}", hook.program()))
    }

    /// Loads the program of `hook`, once per process.
    fn load(&mut self, hook: Hook) -> Result<(), Error> {
        if !self.loaded.insert(hook.program()) {
            return Ok(());
        }
        let result = match hook {
            Hook::UplinkXdp => self.xdp().and_then(Xdp::load),
            _ => self.tc(hook).and_then(SchedClassifier::load),
        };
        result.map_err(|e| {
            self.loaded.remove(hook.program());
            Error::Program { action: Action::Load, program: hook.program(), place: String::new(), reason: chain(&e) }
        })
    }

    fn tc(&mut self, hook: Hook) -> Result<&mut SchedClassifier, ProgramError> {
        self.ebpf.program_mut(hook.program()).ok_or(ProgramError::NotLoaded)?.try_into()
    }

    fn xdp(&mut self) -> Result<&mut Xdp, ProgramError> {
        self.ebpf.program_mut(Hook::UplinkXdp.program()).ok_or(ProgramError::NotLoaded)?.try_into()
    }

    /// Replaces the program of an existing link, unless it is the same.
    fn update(&mut self, hook: Hook, pinned: PinnedLink) -> Result<Change, AyaError> {
        let link = FdLink::from(pinned);
        let running = link.info().ok().and_then(|info| tag_of(info.program_id()));
        let ours = match hook {
            Hook::UplinkXdp => self.xdp()?.info()?.tag(),
            _ => self.tc(hook)?.info()?.tag(),
        };
        if running == Some(ours) {
            return Ok(Change::NONE);
        }
        // The pin keeps the link alive, so aya's handle can be dropped.
        match hook {
            Hook::UplinkXdp => {
                let program = self.xdp()?;
                let id = program.attach_to_link(link.try_into()?)?;
                drop(FdLink::try_from(program.take_link(id)?)?);
            }
            _ => {
                let program = self.tc(hook)?;
                let id = program.attach_to_link(link.try_into()?)?;
                drop(FdLink::try_from(program.take_link(id)?)?);
            }
        }
        Ok(Change::ONE)
    }

    fn create(&mut self, hook: Hook, device: &str, ifindex: u32) -> Result<FdLink, AyaError> {
        match hook {
            Hook::UplinkXdp => {
                let program = self.xdp()?;
                let id = program.attach_to_if_index(ifindex, XdpMode::Driver)?;
                Ok(program.take_link(id)?.try_into()?)
            }
            _ => {
                let program = self.tc(hook)?;
                // First in the chain: a final verdict of another program must not hide packets from Raven's.
                let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                let id = program.attach_with_options(device, hook.direction(), options)?;
                Ok(program.take_link(id)?.try_into()?)
            }
        }
    }

    /// Attaches a TC filter, below Linux 6.6. Aya detaches a filter when its link is dropped, so the link is
    /// leaked on purpose.
    ///
    /// A filter that is replaced in place counts as unchanged: aya cannot read which program it runs.
    fn attach_filter(&mut self, hook: Hook, device: &str) -> Result<Change, ProgramError> {
        // EEXIST is expected; any other failure appears when the filter is added.
        let _ = tc::qdisc_add_clsact(device);
        let handle = TcHandle::new(0, names::TC_HANDLE);
        let program = self.tc(hook)?;
        let mut replaced = names::TC_PRIORITIES.iter().filter_map(|priority| {
            let existing = SchedClassifierLink::attached(device, hook.direction(), *priority, handle, None).ok()?;
            program.attach_to_link(existing).ok()
        });
        if let Some(id) = replaced.next() {
            mem::forget(program.take_link(id)?);
            return Ok(Change::NONE);
        }
        let mut error = ProgramError::NotLoaded;
        for priority in names::TC_PRIORITIES {
            let options = TcAttachOptions::Netlink(NlOptions { priority, handle, classid: None });
            match program.attach_with_options(device, hook.direction(), options) {
                Ok(id) => {
                    mem::forget(program.take_link(id)?);
                    return Ok(Change::ONE);
                }
                Err(e) => error = e,
            }
        }
        Err(error)
    }

    /// Names of the TCX programs that run before the program of `hook` on a device. They also run before every clsact
    /// filter. Empty below Linux 6.6.
    pub fn programs_before(&self, hook: Hook, device: &str, ifindex: u32) -> Vec<String> {
        let Ok((_, attached)) = SchedClassifier::query_tcx(device, hook.direction()) else { return Vec::new() };
        let ours = PinnedLink::from_pin(self.pin(hook, ifindex))
            .ok()
            .and_then(|pinned| Some(FdLink::from(pinned).info().ok()?.program_id()));
        let names = |programs: &[ProgramInfo]| -> Vec<String> {
            programs.iter().map(|p| p.name_as_str().unwrap_or("a program").to_owned()).collect()
        };
        if self.tcx {
            let at = attached.iter().position(|p| Some(p.id()) == ours);
            return names(&attached[..at.unwrap_or(0)]);
        }
        // Raven's program is a filter, so all of these run before it, except a link of Raven's that is being removed.
        names(&attached).into_iter().filter(|name| name != hook.program()).collect()
    }
}

/// ENOLINK: the device of a link was deleted. After any other error the link may still work and is kept.
fn is_stale(error: &(dyn std::error::Error + 'static)) -> bool {
    let errno = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error)
    };
    std::iter::successors(Some(error), |e| e.source()).any(|e| errno(e) == Some(nix::errno::Errno::ENOLINK as i32))
}

/// Removes Raven's clsact filter (below Linux 6.6) from a device, if it is attached.
pub(crate) fn detach_filter(hook: Hook, device: &str) {
    let _ = tc::qdisc_detach_program(device, hook.direction(), hook.program());
}

/// Removes Raven's clsact filter from every device that is or was the uplink. Filters on Raven's devices are
/// deleted with them.
pub(crate) fn detach_uplink_filter() {
    for device in nix::net::if_::if_nameindex().iter().flatten() {
        detach_filter(Hook::UplinkIngress, &device.name().to_string_lossy());
    }
}

pub(super) fn tag_of(program: u32) -> Option<u64> {
    loaded_programs().flatten().find(|p| p.id() == program).map(|p| p.tag())
}

/// An error with its causes, each once. Aya's errors keep the errno in their source.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
