use super::*;
use crate::graph::image::Platform;
use crate::graph::{Copy, InlineFile, Mkdir, Mount, MountKind, Network, Run, Security, Sharing, Unkeyed, Unpack};

fn run() -> Run {
    let bind = MountKind::Bind { input: 1, source: "/out".into(), readonly: true };
    let cache = MountKind::Cache {
        id: "apt".into(),
        sharing: Sharing::Locked,
        input: Some(2),
        source: String::new(),
        mode: 0o755,
        uid: 0,
        gid: 0,
        readonly: false,
    };
    Run {
        args: vec!["/bin/sh".into(), "-c".into(), "make".into()],
        env: vec![("A".into(), "1".into())],
        cwd: "/src".into(),
        user: "me".into(),
        network: Network::Default,
        security: Security::Sandbox,
        mounts: vec![Mount { target: "/a".into(), kind: bind }, Mount { target: "/b".into(), kind: cache }],
        files: vec![InlineFile { path: "/dev/pipes/EOF".into(), data: "x".into(), mode: 0o755 }],
        hosts: Vec::new(),
        hostname: "buildkitsandbox".into(),
        platform: "linux/amd64".parse::<Platform>().unwrap(),
        unkeyed: Unkeyed::default(),
    }
}

fn copy() -> Copy {
    Copy {
        sources: vec![
            CopySource::Path { input: 1, path: "a/*.rs".into(), pivot: None },
            CopySource::Inline { name: "f".into(), data: "text".into() },
        ],
        destination: "/src/".into(),
        owner: None,
        mode: Some("u+x".into()),
        parents: false,
        exclude: vec!["*.o".into()],
        unpack: Unpack::Never,
    }
}

/// Changing one of these makes every cache of every user miss: bump the version that belongs to it, and say so.
#[test]
fn keys_are_pinned() {
    let mut graph = Graph::default();
    let base = graph.add(Op::Image { diff_ids: vec![Digest::of("layer")] }, Vec::new(), Label::default());
    let files = graph.add(Op::Files { digest: Digest::of("files") }, Vec::new(), Label::default());
    let copied = graph.add(Op::Copy(copy()), vec![base, files.clone()], Label::default());
    let ran = graph.add(Op::Run(Box::new(run())), vec![copied.clone(), files.clone(), files], Label::default());
    let made = Mkdir { path: "/w".into(), mode: 0o755, owner: None };
    let made = graph.add(Op::Mkdir(made), vec![ran.clone()], Label::default());
    let identities = [Identity::Root(SnapshotId::scratch()), Identity::Files(Digest::of("files"))];
    let content = content_key(&Op::Copy(copy()), &identities);
    let short = |digest: &Digest| digest.short().to_owned();
    assert_eq!(
        [short(copied.digest()), short(ran.digest()), short(made.digest()), short(&content)],
        ["4ad1443771ae", "08ab5da395c1", "573be63c9a3c", "927e03289c03"]
    );
}

#[test]
fn what_must_not_count_does_not() {
    let key = |run: Run, label: Label| {
        let mut graph = Graph::default();
        let scratch = graph.add(Op::Scratch, Vec::new(), Label::default());
        let op = Op::Run(Box::new(run));
        (content_key(&op, &[Identity::Root(SnapshotId::scratch())]), graph.add(op, vec![scratch], label))
    };
    let first = key(run(), Label::default());
    let unkeyed = Unkeyed {
        proxy_env: vec![("HTTP_PROXY".into(), "http://proxy".into())],
        memory_bytes: Some(1),
        pids: Some(7),
        ..Unkeyed::default()
    };
    assert_eq!(key(Run { unkeyed, ..run() }, Label { name: "x".into(), stage: "y".into(), location: None }), first);
    assert_ne!(key(Run { user: "you".into(), ..run() }, Label::default()), first);
}

#[test]
fn inputs_are_read_as_the_operation_names_them() {
    let part = |paths: &[&str], exclude: &[&str]| Reads::Part {
        selection: Selection {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            exclude: exclude.iter().map(|pattern| (*pattern).to_owned()).collect(),
        },
        parents: false,
    };
    let mut graph = Graph::default();
    let inputs: Vec<NodeId> =
        (0..3).map(|at| graph.add(Op::Files { digest: Digest::of([at]) }, Vec::new(), Label::default())).collect();
    let ran = graph.add(Op::Run(Box::new(run())), inputs.clone(), Label::default());
    assert_eq!(reads(graph.get(&ran)), [Reads::Whole, part(&["out"], &[]), part(&[""], &[])]);
    let copied = graph.add(Op::Copy(copy()), inputs[..2].to_vec(), Label::default());
    assert_eq!(reads(graph.get(&copied)), [Reads::Whole, part(&["a/*.rs"], &["*.o"])]);
}

#[test]
fn facts_survive_their_json() {
    let facts = Facts {
        label: Label { name: "[x 1/2] RUN make".into(), stage: "x".into(), location: None },
        op: Op::Run(Box::new(run())),
        inputs: vec![Identity::Root(SnapshotId::scratch()), Identity::Files(Digest::of("f"))],
    };
    let text = serde_json::to_string(&facts).unwrap();
    assert_eq!(serde_json::from_str::<Facts>(&text).unwrap(), facts);
}
