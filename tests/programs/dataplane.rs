//! The object, loaded for one test, with the tables of [`crate::topology`] in its maps. Nothing is pinned.

use std::collections::BTreeMap;

use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuHashMap, RingBuf, lpm_trie::Key},
    programs::{SchedClassifier, TcAttachType, Xdp, XdpMode, tc},
};
use raven_agent::bpf::{Hook, object};
use raven_common::{
    Verdict,
    mac1::Mac1Key,
    tables::{
        Config, Count, CounterKey, DropSample, GatewayId, KubeletAddress, KubeletNode, Local, NODE_IS_GATEWAY, Node,
        Remote,
    },
};

use crate::{
    packet::node6,
    topology::{GATEWAY, KUBELET, KUBELET_PORT, LOCAL, LOST, ME, MEMBER, Net, REMOTE},
};

/// Counters, summed over CPUs, without those that are zero.
pub(crate) type Counters = BTreeMap<(GatewayId, Verdict), Count>;

/// Constants of linux/pkt_cls.h and linux/bpf.h, defined here again on purpose, independently of the programs.
pub(crate) const TC_UNSPEC: u32 = u32::MAX;
pub(crate) const TC_SHOT: u32 = 2;
pub(crate) const TC_REDIRECT: u32 = 7;
pub(crate) const XDP_DROP: u32 = 1;
pub(crate) const XDP_PASS: u32 = 2;

/// Metadata of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Context {
    /// Payload bytes per segment of an aggregate; 0 otherwise.
    pub gso_size: u32,
    /// Number of packets in an aggregate; 0 otherwise.
    pub gso_segs: u32,
}

impl Context {
    /// Encodes `struct __sk_buff` of linux/bpf.h, with `gso_segs` at byte 164 and `gso_size` at byte 176.
    fn to_sk_buff(self) -> [u8; 192] {
        let mut bytes = [0; 192];
        bytes[164..168].copy_from_slice(&self.gso_segs.to_ne_bytes());
        bytes[176..180].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes
    }
}

/// Encodes `struct xdp_md` of linux/bpf.h for a frame of this length: `data` at byte 0, `data_end` at 4, `data_meta` at
/// 8, then three fields that stay zero. Offsets count from the start of the buffer.
fn xdp_md(frame: usize) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[4..8].copy_from_slice(&(frame as u32).to_ne_bytes());
    bytes
}

/// Result of a program's run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub action: u32,
    /// XDP metadata in front of the packet.
    pub meta: Vec<u8>,
    pub packet: Vec<u8>,
}

/// The loaded object.
pub(crate) struct Dataplane {
    ebpf: Ebpf,
}

impl Dataplane {
    /// Loads every program and fills the maps.
    pub(crate) fn load(config: Config) -> Self {
        let ebpf = EbpfLoader::new().load(object()).expect("load the object");
        let mut dataplane = Self { ebpf };
        for hook in Hook::ALL {
            match hook {
                Hook::UplinkXdp => dataplane.xdp_mut().load().expect("load uplink_xdp"),
                _ => dataplane.tc_mut(hook).load().unwrap_or_else(|e| panic!("load {}: {e:?}", hook.program())),
            }
        }
        dataplane.configure(config);
        dataplane.fill(config);
        dataplane
    }

    /// Changes the configuration of the node.
    pub(crate) fn configure(&mut self, config: Config) {
        let mut map: Array<_, Config> = self.ebpf.map_mut("CONFIG").expect("CONFIG").try_into().expect("an array");
        map.set(0, config, 0).expect("write CONFIG");
    }

    /// Sets the public key that handshake initiations must be made for.
    pub(crate) fn set_handshake_key(&mut self, public: &[u8; 32]) {
        let mut map: Array<_, Mac1Key> = self.ebpf.map_mut("MAC1_KEY").expect("MAC1_KEY").try_into().expect("an array");
        map.set(0, Mac1Key::of(public), 0).expect("write MAC1_KEY");
    }

    fn fill(&mut self, config: Config) {
        for (net, node) in LOCAL {
            self.put("LOCAL4", "LOCAL6", net, Local { node });
        }
        for (net, gateway) in REMOTE {
            // A gateway node carries the prefixes itself.
            let via = if gateway == LOST || config.tunnel_ifindex != 0 { [0; 4] } else { GATEWAY };
            self.put("REMOTE4", "REMOTE6", net, Remote { gateway, via });
        }
        let mut nodes: HashMap<_, [u8; 4], Node> =
            self.ebpf.map_mut("NODES").expect("NODES").try_into().expect("a hash");
        for (node, flags) in [(ME, 0), (MEMBER, 0), (GATEWAY, NODE_IS_GATEWAY)] {
            nodes.insert(node, Node { flags }, 0).expect("write NODES");
        }
        let mut nodes6: HashMap<_, [u8; 16], [u8; 4]> =
            self.ebpf.map_mut("NODES6").expect("NODES6").try_into().expect("a hash");
        for node in [ME, MEMBER, GATEWAY] {
            nodes6.insert(node6(node), node, 0).expect("write NODES6");
        }
        self.add_kubelet("KUBELETS", KUBELET.pod4());
        self.add_kubelet("KUBELETS6", KUBELET.pod6());
    }

    fn add_kubelet<A>(&mut self, name: &str, address: A)
    where
        KubeletAddress<A>: aya::Pod,
    {
        let mut kubelets: HashMap<_, KubeletAddress<A>, KubeletNode> =
            self.ebpf.map_mut(name).expect(name).try_into().expect("a hash");
        let address = KubeletAddress { address, port: KUBELET_PORT, _pad: 0 };
        kubelets.insert(address, KubeletNode { node: [b'x'; 64] }, 0).expect("write the map");
    }

    /// Routes connections to kubelets into the overlay, as on a member.
    pub(crate) fn intercept_kubelet(&mut self, gateway: GatewayId, via: [u8; 4]) {
        self.put("REMOTE4", "REMOTE6", KUBELET, Remote { gateway, via });
    }

    /// Assigns a remote prefix to another Gateway, or removes it.
    pub(crate) fn remote(&mut self, net: Net, gateway: Option<GatewayId>) {
        if let Some(gateway) = gateway {
            return self.put("REMOTE4", "REMOTE6", net, Remote { gateway, via: [0; 4] });
        }
        let mut trie: LpmTrie<_, [u8; 4], Remote> =
            self.ebpf.map_mut("REMOTE4").expect("REMOTE4").try_into().expect("a trie");
        trie.remove(&Key::new(24, net.prefix4())).expect("remove the IPv4 prefix");
        let mut trie: LpmTrie<_, [u8; 16], Remote> =
            self.ebpf.map_mut("REMOTE6").expect("REMOTE6").try_into().expect("a trie");
        trie.remove(&Key::new(64, net.prefix6())).expect("remove the IPv6 prefix");
    }

    fn put<V: aya::Pod>(&mut self, v4: &str, v6: &str, net: Net, value: V) {
        let mut trie: LpmTrie<_, [u8; 4], V> = self.ebpf.map_mut(v4).expect(v4).try_into().expect("a trie");
        trie.insert(&Key::new(24, net.prefix4()), value, 0).expect("add the IPv4 prefix");
        let mut trie: LpmTrie<_, [u8; 16], V> = self.ebpf.map_mut(v6).expect(v6).try_into().expect("a trie");
        trie.insert(&Key::new(64, net.prefix6()), value, 0).expect("add the IPv6 prefix");
    }

    /// Runs a program once, without a device.
    pub(crate) fn run(&self, hook: Hook, packet: &[u8], context: Context) -> Ran {
        match hook {
            Hook::UplinkXdp => self.run_xdp(packet),
            _ => self.run_tc(hook, packet, context),
        }
    }

    fn run_tc(&self, hook: Hook, packet: &[u8], context: Context) -> Ran {
        let mut out = vec![0; 4096];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context.to_sk_buff()),
            ..TestRunOptions::default()
        };
        let result =
            self.tc(hook).test_run(options).unwrap_or_else(|e| panic!("test run of {}: {e:?}", hook.program()));
        out.truncate(result.data_size_out as usize);
        Ran { action: result.return_value, meta: Vec::new(), packet: out }
    }

    fn run_xdp(&self, packet: &[u8]) -> Ran {
        let mut out = vec![0; 4096];
        let mut context = [0; 24];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&xdp_md(packet.len())),
            ctx_out: Some(&mut context),
            ..TestRunOptions::default()
        };
        let result = self.xdp().test_run(options).unwrap_or_else(|e| panic!("test run of uplink_xdp: {e:?}"));
        out.truncate(result.data_size_out as usize);
        let [a, b, c, d, ..] = context;
        let packet = out.split_off(u32::from_ne_bytes([a, b, c, d]) as usize);
        Ran { action: result.return_value, meta: out, packet }
    }

    /// Returns the samples of dropped packets that are in the ring buffer.
    pub(crate) fn samples(&mut self) -> Vec<DropSample> {
        let mut ring = RingBuf::try_from(self.ebpf.map_mut("EVENTS").expect("EVENTS")).expect("a ring buffer");
        let mut samples = Vec::new();
        while let Some(bytes) = ring.next() {
            samples.push(DropSample::parse(&bytes).expect("the record has the length of a sample"));
        }
        samples
    }

    /// Returns the counters since the object was loaded.
    pub(crate) fn counters(&self) -> Counters {
        let map: PerCpuHashMap<&MapData, CounterKey, Count> =
            self.ebpf.map("COUNTERS").expect("COUNTERS").try_into().expect("a per-CPU hash");
        let entries = map.iter().map(|entry| {
            let (key, values) = entry.expect("read COUNTERS");
            let verdict = Verdict::from_number(key.verdict)
                .unwrap_or_else(|| panic!("no verdict has the number {}", key.verdict));
            let sum = values
                .iter()
                .fold(Count::default(), |a, b| Count { packets: a.packets + b.packets, bytes: a.bytes + b.bytes });
            ((key.gateway, verdict), sum)
        });
        entries.collect()
    }

    /// Attaches a program to a device of the current thread's namespace, until the value is dropped.
    pub(crate) fn attach(&mut self, hook: Hook, device: &str) {
        if hook == Hook::UplinkXdp {
            self.xdp_mut().attach(device, XdpMode::Driver).expect("attach uplink_xdp");
            return;
        }
        // Filters require a qdisc before Linux 6.6; on newer kernels it has no effect.
        let _ = tc::qdisc_add_clsact(device);
        let direction = match hook {
            Hook::OverlayEgress | Hook::TunnelEgress => TcAttachType::Egress,
            _ => TcAttachType::Ingress,
        };
        self.tc_mut(hook)
            .attach(device, direction)
            .unwrap_or_else(|e| panic!("attach {} to {device}: {e:?}", hook.program()));
    }

    /// Returns the number of instructions that the verifier followed when it loaded a program; since Linux 5.16.
    pub(crate) fn verified_instructions(&self, hook: Hook) -> Option<u32> {
        let program = self.ebpf.program(hook.program()).expect("the object has the program");
        program.info().expect("read the program's information").verified_instruction_count()
    }

    fn tc(&self, hook: Hook) -> &SchedClassifier {
        self.ebpf.program(hook.program()).expect("the object has the program").try_into().expect("a classifier")
    }

    fn tc_mut(&mut self, hook: Hook) -> &mut SchedClassifier {
        self.ebpf.program_mut(hook.program()).expect("the object has the program").try_into().expect("a classifier")
    }

    fn xdp(&self) -> &Xdp {
        self.ebpf.program("uplink_xdp").expect("the object has the program").try_into().expect("an XDP program")
    }

    fn xdp_mut(&mut self) -> &mut Xdp {
        self.ebpf.program_mut("uplink_xdp").expect("the object has the program").try_into().expect("an XDP program")
    }
}
