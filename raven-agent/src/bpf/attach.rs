//! Attaching programs so that they stay, and replacing them without a gap.
//!
//! TCX (Linux 6.6) and XDP give links, which are pinned by program and device and updated in place. Below, TC filters
//! stay by themselves; ours have a fixed priority and handle, and are replaced under these.

use std::{fs, mem, path::PathBuf};

use aya::programs::{
    LinkOrder, ProgramError, ProgramInfo, SchedClassifier, TcAttachType, Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    loaded_programs,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};

use super::{Bpf, Error};
use crate::names;

/// Aya's errors of several kinds, on their way to [`chain`].
type Refusal = Box<dyn std::error::Error + Send + Sync>;

/// A program and where it belongs.
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
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::OverlayEgress, Self::OverlayIngress, Self::UplinkXdp, Self::UplinkIngress, Self::TunnelIngress, Self::TunnelEgress];

    /// The program's name, in the object, in `bpftool` and in pins.
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

    /// True if it sees what leaves the device.
    pub fn is_egress(self) -> bool {
        matches!(self, Self::OverlayEgress | Self::TunnelEgress)
    }

    fn direction(self) -> TcAttachType {
        if self.is_egress() { TcAttachType::Egress } else { TcAttachType::Ingress }
    }
}

/// What an attachment changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// It was not there.
    New,
    /// Another version was there and was replaced in place.
    Replaced,
    /// This very program was there.
    Unchanged,
}

impl Bpf {
    /// Sees to it that `hook`'s program runs on the device.
    pub fn attach(&mut self, hook: Hook, device: &str, ifindex: u32) -> Result<Attached, Error> {
        self.load(hook)?;
        let failed = |reason: String| Error::Program { action: "attach", program: hook.program(), place: format!(" to {device}"), reason };
        // A device that was made anew has another index: the old link is of no use.
        self.unpin_other_devices(hook, ifindex);
        if hook != Hook::UplinkXdp && !self.tcx {
            let attached = self.attach_filter(hook, device).map_err(|e| failed(chain(&e)))?;
            // A link that an agent with other settings left.
            self.detach(hook);
            return Ok(attached);
        }
        let path = self.pin(hook, ifindex);
        if let Ok(pinned) = PinnedLink::from_pin(&path) {
            match self.update(hook, pinned) {
                Ok(attached) => return Ok(attached),
                Err(e) if !is_dead(e.as_ref()) => return Err(failed(chain(e.as_ref()))),
                Err(_) => fs::remove_file(&path).map_err(|e| failed(format!("remove the dead link {}: {e}", path.display())))?,
            }
        }
        let link = self.create(hook, device, ifindex).map_err(|e| failed(chain(e.as_ref())))?;
        link.pin(&path).map_err(|e| failed(format!("pin the link at {}: {e}", path.display())))?;
        if hook != Hook::UplinkXdp {
            detach_filter(hook, device);
        }
        Ok(Attached::New)
    }

    /// Takes `hook`'s program off every device.
    pub fn detach(&mut self, hook: Hook) {
        self.unpin_other_devices(hook, 0);
    }

    /// True if the program is pinned to a device.
    pub fn is_attached(&self, hook: Hook, ifindex: u32) -> bool {
        self.pin(hook, ifindex).exists()
    }

    fn pin(&self, hook: Hook, ifindex: u32) -> PathBuf {
        self.pins.join("links").join(format!("{}-{ifindex}", hook.program()))
    }

    fn unpin_other_devices(&self, hook: Hook, ifindex: u32) {
        let keep = self.pin(hook, ifindex);
        let Ok(entries) = fs::read_dir(self.pins.join("links")) else { return };
        for path in entries.flatten().map(|e| e.path()).filter(|p| *p != keep) {
            let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.rsplit_once('-'));
            if name.is_some_and(|(program, _)| program == hook.program()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Loads `hook`'s program, once per process.
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
            Error::Program { action: "load", program: hook.program(), place: String::new(), reason: chain(&e) }
        })
    }

    fn tc(&mut self, hook: Hook) -> Result<&mut SchedClassifier, ProgramError> {
        self.ebpf.program_mut(hook.program()).ok_or(ProgramError::NotLoaded)?.try_into()
    }

    fn xdp(&mut self) -> Result<&mut Xdp, ProgramError> {
        self.ebpf.program_mut(Hook::UplinkXdp.program()).ok_or(ProgramError::NotLoaded)?.try_into()
    }

    /// Puts our program into an existing link, unless it is there.
    fn update(&mut self, hook: Hook, pinned: PinnedLink) -> Result<Attached, Refusal> {
        let link = FdLink::from(pinned);
        let running = link.info().ok().and_then(|info| tag_of(info.program_id()));
        let ours = match hook {
            Hook::UplinkXdp => self.xdp()?.info()?.tag(),
            _ => self.tc(hook)?.info()?.tag(),
        };
        if running == Some(ours) {
            return Ok(Attached::Unchanged);
        }
        // The pin keeps the link; the handle that aya holds may go.
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
        Ok(Attached::Replaced)
    }

    fn create(&mut self, hook: Hook, device: &str, ifindex: u32) -> Result<FdLink, Refusal> {
        match hook {
            Hook::UplinkXdp => {
                let program = self.xdp()?;
                let id = program.attach_to_if_index(ifindex, XdpMode::Driver)?;
                Ok(program.take_link(id)?.try_into()?)
            }
            _ => {
                let program = self.tc(hook)?;
                // First in the chain: another owner's final verdict must not hide our packets from us.
                let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                let id = program.attach_with_options(device, hook.direction(), options)?;
                Ok(program.take_link(id)?.try_into()?)
            }
        }
    }

    /// The way below Linux 6.6. Aya would take the filter away with its handle: the handle is forgotten on purpose.
    fn attach_filter(&mut self, hook: Hook, device: &str) -> Result<Attached, ProgramError> {
        // "Exists" is what we want; anything else shows when the filter is made.
        let _ = tc::qdisc_add_clsact(device);
        let handle = TcHandle::new(0, names::TC_HANDLE);
        let program = self.tc(hook)?;
        let mut replaced = names::TC_PRIORITIES.iter().filter_map(|priority| {
            let existing = SchedClassifierLink::attached(device, hook.direction(), *priority, handle, None).ok()?;
            program.attach_to_link(existing).ok()
        });
        if let Some(id) = replaced.next() {
            mem::forget(program.take_link(id)?);
            return Ok(Attached::Replaced);
        }
        let mut refused = ProgramError::NotLoaded;
        for priority in names::TC_PRIORITIES {
            let options = TcAttachOptions::Netlink(NlOptions { priority, handle, classid: None });
            match program.attach_with_options(device, hook.direction(), options) {
                Ok(id) => {
                    mem::forget(program.take_link(id)?);
                    return Ok(Attached::New);
                }
                Err(e) => refused = e,
            }
        }
        Err(refused)
    }

    /// Names of the programs of TCX that are asked before `hook`'s on a device (before any filter of clsact, too). Below Linux 6.6, none.
    pub fn asked_before(&self, hook: Hook, device: &str, ifindex: u32) -> Vec<String> {
        let Ok((_, asked)) = SchedClassifier::query_tcx(device, hook.direction()) else { return Vec::new() };
        let ours =
            PinnedLink::from_pin(self.pin(hook, ifindex)).ok().and_then(|pinned| Some(FdLink::from(pinned).info().ok()?.program_id()));
        let names = |programs: &[ProgramInfo]| -> Vec<String> {
            programs.iter().map(|p| p.name_as_str().unwrap_or("a program").to_owned()).collect()
        };
        if self.tcx {
            let at = asked.iter().position(|p| Some(p.id()) == ours);
            return names(&asked[..at.unwrap_or(0)]);
        }
        // Ours is a filter: all of these come before, but for a link of ours that is just going away.
        names(&asked).into_iter().filter(|name| name != hook.program()).collect()
    }
}

/// ENOLINK: the device behind a link is gone. What else goes wrong is no reason to give up a link that works.
fn is_dead(error: &(dyn std::error::Error + 'static)) -> bool {
    let errno = |e: &(dyn std::error::Error + 'static)| e.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    std::iter::successors(Some(error), |e| e.source()).any(|e| errno(e) == Some(nix::errno::Errno::ENOLINK as i32))
}

/// Takes our filter off a device where it is no link (below Linux 6.6). Nothing there is no error.
pub(crate) fn detach_filter(hook: Hook, device: &str) {
    let _ = tc::qdisc_detach_program(device, hook.direction(), hook.program());
}

/// Takes our filter off the uplink, whichever device that is or was. Filters on our own devices go with them.
pub(crate) fn detach_uplink_filter() {
    for device in nix::net::if_::if_nameindex().iter().flatten() {
        detach_filter(Hook::UplinkIngress, &device.name().to_string_lossy());
    }
}

pub(super) fn tag_of(program: u32) -> Option<u64> {
    loaded_programs().flatten().find(|p| p.id() == program).map(|p| p.tag())
}

/// An error with its causes: aya keeps the errno one level down.
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
