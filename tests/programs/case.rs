//! A test case: one packet with its expected result.

use std::fmt::Write as _;

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    tables::{Count, GatewayId},
};

use crate::dataplane::{Context, Counters, Dataplane, TC_REDIRECT, TC_SHOT, TC_UNSPEC, XDP_DROP, XDP_PASS};

/// A test case.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    name: String,
    packet: Vec<u8>,
    context: Context,
    action: u32,
    counted: Option<(GatewayId, Verdict)>,
    meta: Vec<u8>,
    out: Out,
}

/// Expected packet after the program.
#[derive(Clone, Debug)]
enum Out {
    Unchanged,
    Exactly(Vec<u8>),
    /// Not compared here, but with real devices.
    Elsewhere,
}

impl Case {
    /// Creates a case. Default expectation: the packet passes, unchanged and uncounted.
    pub(crate) fn new(name: impl Into<String>, packet: Vec<u8>) -> Self {
        let context = Context::default();
        Self {
            name: name.into(),
            packet,
            context,
            action: TC_UNSPEC,
            counted: None,
            meta: Vec::new(),
            out: Out::Unchanged,
        }
    }

    /// Makes the packet an aggregate.
    pub(crate) fn aggregate(mut self, gso_segs: u32, gso_size: u32) -> Self {
        self.context = Context { gso_size, gso_segs };
        self
    }

    /// Expects that the packet passes to the next program and is counted.
    pub(crate) fn passes(mut self, gateway: GatewayId, verdict: Verdict) -> Self {
        (self.action, self.counted) = (TC_UNSPEC, Some((gateway, verdict)));
        self
    }

    /// Expects a redirect.
    pub(crate) fn redirected(mut self, gateway: GatewayId, verdict: Verdict) -> Self {
        (self.action, self.counted) = (TC_REDIRECT, Some((gateway, verdict)));
        self
    }

    /// Expects a drop.
    pub(crate) fn dropped(mut self, gateway: GatewayId, verdict: Verdict) -> Self {
        (self.action, self.counted) = (TC_SHOT, Some((gateway, verdict)));
        self
    }

    /// XDP: expects that the packet passes uncounted.
    pub(crate) fn xdp_passes(mut self) -> Self {
        self.action = XDP_PASS;
        self
    }

    /// XDP: expects a drop.
    pub(crate) fn xdp_dropped(mut self, gateway: GatewayId, verdict: Verdict) -> Self {
        (self.action, self.counted) = (XDP_DROP, Some((gateway, verdict)));
        self
    }

    /// Expects these bytes.
    pub(crate) fn becomes(mut self, packet: Vec<u8>) -> Self {
        self.out = Out::Exactly(packet);
        self
    }

    /// Does not compare the bytes, which another test compares with real devices.
    pub(crate) fn becomes_elsewhere(mut self) -> Self {
        self.out = Out::Elsewhere;
        self
    }

    /// Expects this XDP metadata.
    pub(crate) fn with_meta(mut self, meta: Vec<u8>) -> Self {
        self.meta = meta;
        self
    }

    /// Runs the case. Returns all deviations, or `None`.
    fn failure(&self, dataplane: &Dataplane, hook: Hook) -> Option<String> {
        let before = dataplane.counters();
        let ran = dataplane.run(hook, &self.packet, self.context);
        let counted = difference(&before, &dataplane.counters());
        let packets = u64::from(self.context.gso_segs.max(1));
        let expected =
            self.counted.map(|key| (key, Count { packets, bytes: self.packet.len() as u64 })).into_iter().collect();
        let mut text = String::new();
        if ran.action != self.action {
            let _ = writeln!(text, "  action {}, expected {}", ran.action as i32, self.action as i32);
        }
        if counted != expected {
            let _ = writeln!(text, "  counted {counted:?}, expected {expected:?}");
        }
        text += &hex_difference("metadata", &self.meta, &ran.meta);
        match &self.out {
            Out::Unchanged => text += &hex_difference("packet", &self.packet, &ran.packet),
            Out::Exactly(packet) => text += &hex_difference("packet", packet, &ran.packet),
            Out::Elsewhere => {}
        }
        (!text.is_empty()).then(|| format!("{}:\n{text}", self.name))
    }
}

/// Runs all cases and fails with the deviations of all of them.
pub(crate) fn check(dataplane: &Dataplane, hook: Hook, cases: &[Case]) {
    let failures: Vec<String> = cases.iter().filter_map(|case| case.failure(dataplane, hook)).collect();
    assert!(
        failures.is_empty(),
        "{} of {} cases of {}:\n{}",
        failures.len(),
        cases.len(),
        hook.program(),
        failures.join("\n")
    );
}

/// Returns the increase of counters.
pub(crate) fn difference(before: &Counters, after: &Counters) -> Counters {
    let increased = after.iter().filter_map(|(key, count)| {
        let old = before.get(key).copied().unwrap_or_default();
        let increase = Count { packets: count.packets - old.packets, bytes: count.bytes - old.bytes };
        (increase != Count::default()).then_some((*key, increase))
    });
    increased.collect()
}

/// Returns the lines of 16 bytes in which two packets differ; empty if they are equal.
pub(crate) fn hex_difference(what: &str, expected: &[u8], seen: &[u8]) -> String {
    if expected == seen {
        return String::new();
    }
    let mut text = format!("  {what}: {} bytes, expected {}\n", seen.len(), expected.len());
    let line = |bytes: &[u8], at: usize| -> String {
        let end = bytes.len().min(at + 16);
        bytes.get(at..end).unwrap_or_default().iter().map(|b| format!("{b:02x} ")).collect()
    };
    for at in (0..expected.len().max(seen.len())).step_by(16) {
        let (want, have) = (line(expected, at), line(seen, at));
        if want != have {
            let _ = writeln!(text, "    {at:04x} expected {want}\n         seen     {have}");
        }
    }
    text
}
