//! Tests of upgrades: programs of another version replace the running ones in place under traffic, and vice versa.

use std::collections::BTreeSet;

use raven_tests::{Node, agent::ebpf_object, proof, require_root};

use crate::Running;

impl Running {
    /// Returns the tags of the programs in the pinned links of all nodes. A tag is the kernel's hash
    /// of a program's instructions.
    fn tags(&self) -> BTreeSet<String> {
        let of = |node: &Node| {
            // Prints the ID of each link's program, then its name and tag.
            let script = "for link in /sys/fs/bpf/raven/v1/links/*; do id=$(bpftool link show pinned $link | sed -n 's/.* prog \\([0-9]*\\).*/\\1/p'); \
                          bpftool prog show id $id | sed -n 's/.* name \\([a-z_]*\\) *tag \\([0-9a-f]*\\).*/\\1 \\2/p'; done";
            self.check(node.ns.sh(script)).lines().map(|line| format!("{} {line}", node.name)).collect::<Vec<_>>()
        };
        self.lab.nodes.iter().flat_map(of).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn program_replacement_loses_no_packet() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let original = running.tags();
    assert!(original.len() > 10, "every node has programs: {original:?}");
    // The same programs with logging have different instructions and therefore different tags.
    let tracing = ebpf_object("ebpf-trace", "raven").expect("the object with logging is built");
    for agent in &mut running.agents {
        agent.arguments.extend(["--ebpf-object".to_owned(), tracing.display().to_string()]);
    }
    let taken = proof::restart(&running.lab, &mut running.agents, "x-b", "y-b", 0).await;
    println!("upgrade: {}", running.check(taken));
    let replaced = running.tags();
    assert_eq!(replaced.len(), original.len());
    let same: Vec<_> = original.intersection(&replaced).filter(|name| !name.contains("kubelet_lookup")).collect();
    // The XDP program has no log statements.
    assert!(same.iter().all(|name| name.contains("uplink_xdp")), "not replaced: {same:?}");
    // The agent logs the programs' messages (aya-log).
    let log = running.agent("x-a").process.output().expect("read the agent's log");
    assert!(log.contains("verdict ") && log.contains(" gateway "), "the agent's log lacks the programs' messages");

    for agent in &mut running.agents {
        agent.arguments.truncate(agent.arguments.len() - 2);
    }
    let taken = proof::restart(&running.lab, &mut running.agents, "y-b", "cloud-b", 1).await;
    println!("upgrade: {}", running.check(taken));
    assert_eq!(running.tags(), original, "all programs are replaced again");
}
