//! Runs real kubelets with containerd on nodes of the lab, and further API servers on cloud nodes, with kube-proxy and
//! CoreDNS: the components on the L7 path.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Node as NodeObject, Pod, ServiceAccount};
use kube::api::{Api, Patch, PatchParams};
use raven_api::proxy::{DNS_CONFIG_MAP, DNS_KEY};
use serde_json::json;

use crate::kubernetes::binaries::{NODE, Programs};
use crate::namespace::output;
use crate::process::Process;
use crate::site::Node;
use crate::{Lab, eventually};

/// Image of all pods: busybox only, built by the lab.
pub const IMAGE: &str = "raven.test/busybox:1";
/// Port of further API servers.
pub const SECOND_API_PORT: u16 = 7443;

const SOON: Duration = Duration::from_secs(60);

/// The kubelet and containerd of a node.
#[derive(Debug)]
pub struct Kubelet {
    /// Name of the node.
    pub node: String,
    /// The command of containerd's client.
    ctr: Vec<String>,
    _containerd: Process,
    _kubelet: Process,
}

/// An API server on a cloud node, with the programs it needs to resolve kubelets' names.
#[derive(Debug)]
pub struct SecondApiServer {
    /// Path of the administrator's kubeconfig for this server.
    pub kubeconfig: PathBuf,
    kubectl: PathBuf,
    process: Process,
    _helpers: Vec<Process>,
}

/// Address type by which an API server connects to kubelets (`--kubelet-preferred-address-types`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefer {
    /// By node name.
    Hostname,
    /// By node address.
    InternalIP,
}

impl SecondApiServer {
    /// Returns a kubectl command that uses this server.
    pub fn kubectl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        command.env("KUBECACHEDIR", self.kubeconfig.with_extension("cache")).env("NO_PROXY", "*");
        command
    }

    /// Kills the server and its helper programs.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()
    }
}

impl Kubelet {
    /// Imports an image archive.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.ctr(&["images", "import", "--local", &archive.to_string_lossy()])
            .map(drop)
            .with_context(|| format!("import {} on {}", archive.display(), self.node))
    }

    /// Runs a command of containerd's client in the kubelet's namespace and returns its standard output.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        ctr(&self.ctr, args)
    }
}

fn ctr(command: &[String], args: &[&str]) -> Result<String> {
    output(Command::new(&command[0]).args(&command[1..]).args(args))
}

impl Lab {
    /// Starts containerd and kubelet on a node and waits until the kubelet has updated the Node object.
    pub async fn start_kubelet(&self, name: &str) -> Result<Kubelet> {
        let binaries = NODE.find_or_build().await?;
        let node = self.node(name);
        let dir = node.dir.join("kubelet");
        fs::create_dir_all(dir.join("root"))?;
        let socket = dir.join("containerd.sock");
        fs::write(dir.join("containerd.toml"), containerd_config(&dir))?;
        let mut command = node.ns.command(binaries.program("containerd"));
        command.args(["--config"]).arg(dir.join("containerd.toml")).env("PATH", path_with(&binaries.dir));
        let containerd = Process::start(format!("containerd-{name}"), &self.logs(), command)?;
        let mut client = node.ns.nsenter();
        client.push(binaries.program("ctr").to_string_lossy().into_owned());
        client.extend(["--address".to_owned(), socket.to_string_lossy().into_owned()]);
        client.extend(["--namespace", "k8s.io"].map(str::to_owned));
        eventually(SOON, "containerd responds", || async { ctr(&client, &["version"]) }).await?;
        let kubelet = self.kubelet(node, &dir, &socket, &binaries)?;
        let kubelet = Kubelet { node: name.to_owned(), ctr: client, _containerd: containerd, _kubelet: kubelet };
        kubelet.import(&image(&dir)?)?;
        let api: Api<NodeObject> = Api::all(self.cluster().client());
        eventually(SOON, &format!("the kubelet of {name} has registered"), || async {
            let status = api.get(name).await?.status.context("the Node has no status")?;
            let port = status.daemon_endpoints.and_then(|d| d.kubelet_endpoint).map(|e| e.port);
            ensure!(port == Some(10250), "the kubelet's port is {port:?}");
            Ok(())
        })
        .await?;
        Ok(kubelet)
    }

    fn kubelet(&self, node: &Node, dir: &Path, socket: &Path, binaries: &Programs) -> Result<Process> {
        let addresses = node.addresses();
        let names = addresses.iter().map(IpAddr::to_string).chain([node.name.clone()]).collect();
        let (certificate, key) = self.cluster().sign_server(&format!("system:node:{}", node.name), names)?;
        let file = |name: &str, content: &str| -> Result<PathBuf> {
            let path = dir.join(name);
            fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
            Ok(path)
        };
        let (certificate, key) = (file("kubelet.crt", &certificate)?, file("kubelet.key", &key)?);
        let server = self.cluster().server_for(self, node);
        let kubeconfig = file("kubeconfig", &self.cluster().admin_kubeconfig(&server))?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": { "anonymous": { "enabled": false }, "webhook": { "enabled": true }, "x509": { "clientCAFile": self.cluster().file("ca.crt") } },
            "authorization": { "mode": "Webhook" },
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": false,
            "enforceNodeAllocatable": [],
            "failCgroupV1": false,
            "failSwapOn": false,
            "containerRuntimeEndpoint": format!("unix://{}", socket.display()),
            "podLogsDir": dir.join("logs"),
            "readOnlyPort": 10255,
            "registerNode": true,
            "resolvConf": "",
            "evictionHard": { "nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "1Mi" },
            "tlsCertFile": certificate,
            "tlsPrivateKeyFile": key,
            "volumePluginDir": dir.join("plugins"),
        });
        let config = file("kubelet.json", &config.to_string())?;
        let mut command = node.ns.command(binaries.program("kubelet"));
        command.arg("--config").arg(config).arg("--kubeconfig").arg(kubeconfig);
        command
            .arg("--hostname-override")
            .arg(&node.name)
            .arg("--node-ip")
            .arg(addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","));
        command.arg("--root-dir").arg(dir.join("root"));
        command.env("PATH", path_with(&binaries.dir));
        Process::start(format!("kubelet-{}", node.name), &self.logs(), command)
    }

    /// Creates a pod with one busybox container on a node's host network, and waits until it runs.
    pub async fn run_pod(&self, node: &str, name: &str, script: &str) -> Result<()> {
        let client = self.cluster().client();
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
        let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "default" } });
        accounts
            .patch("default", &PatchParams::apply("raven-lab"), &Patch::Apply(&account))
            .await
            .context("create the default service account")?;
        let pods: Api<Pod> = Api::namespaced(client, "default");
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
            "spec": {
                "nodeName": node, "hostNetwork": true, "automountServiceAccountToken": false, "enableServiceLinks": false,
                "terminationGracePeriodSeconds": 1,
                "tolerations": [{ "operator": "Exists" }],
                "containers": [{ "name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "stdin": true, "command": ["/bin/sh", "-c", script] }],
            },
        });
        pods.patch(name, &PatchParams::apply("raven-lab").force(), &Patch::Apply(&pod))
            .await
            .with_context(|| format!("create Pod {name}"))?;
        eventually(SOON, &format!("Pod {name} runs on {node}"), || async {
            let status = pods.get(name).await?.status.context("the Pod has no status")?;
            ensure!(status.phase.as_deref() == Some("Running"), "{:?}: {:?}", status.phase, status.container_statuses);
            Ok(())
        })
        .await
    }

    /// Starts a further API server on a cloud node. With [`Prefer::Hostname`] it has the setup of such a cluster:
    /// CoreDNS with the hosts file that the controller maintains, and kube-proxy for the proxy's Service.
    pub async fn api_server_on(&self, name: &str, prefer: Prefer) -> Result<SecondApiServer> {
        let binaries = NODE.find_or_build().await?;
        let node = self.node(name);
        let dir = node.dir.join("api-server");
        fs::create_dir_all(&dir)?;
        let mut helpers = Vec::new();
        if prefer == Prefer::Hostname {
            helpers = self.names_and_services(node, &dir, &binaries).await?;
        }
        let mut command = self.cluster().api_server_at(&node.ns, node.lan_v4, SECOND_API_PORT, &dir);
        // Not every node with an API server has kube-proxy, so metrics-server is called by its endpoint address.
        command.arg(format!("--kubelet-preferred-address-types={prefer:?}")).arg("--enable-aggregator-routing=true");
        let mut process = Process::start(format!("kube-apiserver-{name}"), &self.logs(), command)?;
        let kubeconfig = dir.join("kubeconfig");
        fs::write(&kubeconfig, self.cluster().admin_kubeconfig(&format!("https://{}:{SECOND_API_PORT}", node.lan_v4)))?;
        let kubectl = self.cluster().kubectl_program();
        let ready = || {
            let alive = process.ensure_running();
            let mut command = node.ns.command(&kubectl);
            command.arg("--kubeconfig").arg(&kubeconfig).args(["get", "--raw", "/readyz"]);
            async move {
                alive?;
                output(&mut command)
            }
        };
        eventually(SOON, &format!("the API server on {name} is ready"), ready).await?;
        Ok(SecondApiServer { kubeconfig, kubectl: self.wrapped_kubectl(node, &dir)?, process, _helpers: helpers })
    }

    /// Writes a script that runs kubectl in a node's namespace.
    fn wrapped_kubectl(&self, node: &Node, dir: &Path) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("kubectl");
        let program = self.cluster().kubectl_program();
        fs::write(&path, format!("#!/bin/sh\nexec {} {} \"$@\"\n", node.ns.nsenter().join(" "), program.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    async fn names_and_services(&self, node: &Node, dir: &Path, binaries: &Programs) -> Result<Vec<Process>> {
        let api: Api<ConfigMap> = Api::namespaced(self.cluster().client(), raven_api::DEFAULT_NAMESPACE);
        let hosts = eventually(SOON, "the controller has written the hosts file", || async {
            let hosts = api
                .get(DNS_CONFIG_MAP)
                .await?
                .data
                .and_then(|mut data| data.remove(DNS_KEY))
                .context("the ConfigMap has no data")?;
            ensure!(
                hosts.lines().any(|line| line.starts_with("10.96.")),
                "no name resolves to the Service yet: {hosts}"
            );
            Ok(hosts)
        })
        .await?;
        // The same file that the kubelet would mount into CoreDNS.
        fs::write(dir.join("tunnel-nodes"), hosts)?;
        let corefile = format!(
            ".:53 {{\n  bind {}\n  errors\n  hosts {} {{\n    reload 300ms\n  }}\n}}\n",
            node.lan_v4,
            dir.join("tunnel-nodes").display()
        );
        fs::write(dir.join("Corefile"), corefile)?;
        let mut coredns = node.ns.command(binaries.program("coredns"));
        coredns.arg("-conf").arg(dir.join("Corefile"));
        let coredns = Process::start(format!("coredns-{}", node.name), &self.logs(), coredns)?;
        fs::write(dir.join("resolv.conf"), format!("nameserver {}\n", node.lan_v4))?;
        node.ns
            .sh(&format!("mount --bind {} /etc/resolv.conf", dir.join("resolv.conf").display()))
            .context("set the node's DNS server")?;
        let kube_proxy = self.start_kube_proxy(node, dir, binaries)?;
        // DNAT applies only to routable Service addresses; the node's default route covers them.
        Ok(vec![coredns, kube_proxy])
    }

    /// Starts kube-proxy on a node, with its files in `dir`.
    pub(crate) fn start_kube_proxy(&self, node: &Node, dir: &Path, binaries: &Programs) -> Result<Process> {
        let kubeconfig = dir.join("kube-proxy.kubeconfig");
        fs::write(&kubeconfig, self.cluster().admin_kubeconfig(&self.cluster().server_for(self, node)))?;
        let mut kube_proxy = node.ns.command(binaries.program("kube-proxy"));
        kube_proxy.arg("--kubeconfig").arg(&kubeconfig).arg("--hostname-override").arg(&node.name).args([
            "--proxy-mode=nftables",
            "--conntrack-max-per-core=0",
            "--conntrack-min=0",
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
        ]);
        Process::start(format!("kube-proxy-{}", node.name), &self.logs(), kube_proxy)
    }
}

fn path_with(dir: &Path) -> String {
    format!("{}:{}:/usr/sbin:/sbin", dir.display(), std::env::var("PATH").unwrap_or_default())
}

fn containerd_config(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"version = 3
root = "{dir}/containerd"
state = "{dir}/containerd-run"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{dir}/containerd.sock"
[ttrpc]
  address = "{dir}/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  # Below `state`, which is removed with the lab.
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{dir}/cni"
"#
    )
}

/// Builds an image archive (docker format) with a static busybox and returns its path.
fn image(dir: &Path) -> Result<PathBuf> {
    let script = format!(
        r#"cd {dir}; rm -rf image; mkdir -p image/layer/bin image/layer/tmp image/layer/etc image/layer/proc image/layer/sys image/layer/dev; cd image
cp "$(command -v busybox)" layer/bin/busybox
for applet in $(layer/bin/busybox --list); do [ $applet = busybox ] || ln -s busybox layer/bin/$applet; done
echo 'root:x:0:0:root:/:/bin/sh' > layer/etc/passwd
tar -C layer --owner 0 --group 0 -cf layer.tar .
sum=$(sha256sum layer.tar | cut -d' ' -f1)
cat > config.json <<EOF
{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/bin/sleep","2147483647"],"Env":["PATH=/bin"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:$sum"]}}}}
EOF
echo '[{{"Config":"config.json","RepoTags":["{IMAGE}"],"Layers":["layer.tar"]}}]' > manifest.json
tar -cf ../image.tar manifest.json config.json layer.tar
"#,
        dir = dir.display()
    );
    output(Command::new("sh").args(["-ec", &script])).context("build the image")?;
    Ok(dir.join("image.tar"))
}
