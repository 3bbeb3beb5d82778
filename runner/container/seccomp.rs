//! The system call filter of a sandboxed container: docker's default policy, compiled to one BPF program for all
//! architectures that the kernel runs natively (32-bit programs are filtered too, not killed).
//!
//! ```text
//! load arch ── x86-64 ─> load number ─> binary search over runs of equal verdicts ─> return
//!           ├─ i386   ─> load number ─> ...
//!           └─ other: refuse with EPERM
//! ```
//! A call that is denied gets `EPERM`; one that the table does not know gets `ENOSYS`, so that libraries newer than forge fall
//! back to what they did before. `clone3` gets `ENOSYS` too: its flags are behind a pointer that a filter cannot read.

mod table;

use libc::sock_filter;

use super::capability::{self, Set};
use table::{NONE, SYSCALLS};

/// What the policy says to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    Allow,
    Deny,
    /// Allowed to who holds any of these.
    With(Set),
    /// No `AF_ALG` and no `AF_VSOCK`.
    Socket,
    /// Linux, 32-bit Linux and UNAME26, and the query.
    Personality,
    /// No new namespaces without `SYS_ADMIN`.
    Clone,
    /// As `Clone`, but the flags cannot be seen.
    Clone3,
}

/// A calling convention; the value is the column in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    X86_64 = 0,
    X86 = 1,
    /// arm64 and riscv64 number their calls alike.
    Generic = 2,
    Arm = 3,
}

const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_X86: u32 = 0x4000_0003;
const AUDIT_ARM64: u32 = 0xc000_00b7;
const AUDIT_ARM: u32 = 0x4000_0028;
const AUDIT_RISCV64: u32 = 0xc000_00f3;

/// The architectures that this machine runs natively, by their audit numbers. Empty: no filter can be made.
pub fn native() -> &'static [(u32, Abi)] {
    match std::env::consts::ARCH {
        "x86_64" => &[(AUDIT_X86_64, Abi::X86_64), (AUDIT_X86, Abi::X86)],
        "aarch64" => &[(AUDIT_ARM64, Abi::Generic), (AUDIT_ARM, Abi::Arm)],
        "riscv64" => &[(AUDIT_RISCV64, Abi::Generic)],
        _ => &[],
    }
}

/// What the filter answers, possibly after a look at one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allow,
    Errno(i32),
    Socket,
    Personality,
    CloneFlags,
}

const NEW_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP) as u32;

fn verdict(rule: Rule, capabilities: Set) -> Verdict {
    let holds = |any: Set| capabilities & any != 0;
    match rule {
        Rule::Allow => Verdict::Allow,
        Rule::Deny => Verdict::Errno(libc::EPERM),
        Rule::With(any) if holds(any) => Verdict::Allow,
        Rule::With(_) => Verdict::Errno(libc::EPERM),
        Rule::Socket => Verdict::Socket,
        Rule::Personality => Verdict::Personality,
        Rule::Clone | Rule::Clone3 if holds(capability::SYS_ADMIN) => Verdict::Allow,
        Rule::Clone => Verdict::CloneFlags,
        Rule::Clone3 => Verdict::Errno(libc::ENOSYS),
    }
}

/// The filter for a process with these capabilities.
pub fn compile(capabilities: Set, architectures: &[(u32, Abi)]) -> Vec<sock_filter> {
    let mut program = vec![load(ARCH_OFFSET)];
    for &(audit, abi) in architectures {
        let mut body = vec![load(NUMBER_OFFSET)];
        body.extend(search(&runs(capabilities, abi)));
        program.extend(branch(JEQ, audit, &body));
    }
    program.push(errno(libc::EPERM));
    program
}

/// The number space cut into runs of equal verdicts: each starts at its number and ends before the next.
fn runs(capabilities: Set, abi: Abi) -> Vec<(u32, Verdict)> {
    let unknown = Verdict::Errno(libc::ENOSYS);
    let mut known: Vec<(u32, Verdict)> = SYSCALLS
        .iter()
        .filter(|(_, _, numbers)| numbers[abi as usize] != NONE)
        .map(|&(_, rule, numbers)| (numbers[abi as usize] as u32, verdict(rule, capabilities)))
        .collect();
    known.sort_by_key(|&(number, _)| number);
    let mut runs = vec![(0, unknown)];
    let mut add = |start: u32, verdict: Verdict| match runs.last_mut() {
        Some((_, last)) if *last == verdict => {}
        Some((at, last)) if *at == start => *last = verdict,
        _ => runs.push((start, verdict)),
    };
    let mut next = 0;
    for (number, verdict) in known {
        if number > next {
            add(next, unknown);
        }
        add(number, verdict);
        next = number + 1;
    }
    add(next, unknown);
    runs
}

fn search(runs: &[(u32, Verdict)]) -> Vec<sock_filter> {
    if let [(_, verdict)] = runs {
        return answer(*verdict);
    }
    let (low, high) = runs.split_at(runs.len() / 2);
    let mut code = branch(JGE, high[0].0, &search(high));
    code.extend(search(low));
    code
}

fn answer(verdict: Verdict) -> Vec<sock_filter> {
    let refuse = errno(libc::EPERM);
    match verdict {
        Verdict::Allow => vec![ALLOW],
        Verdict::Errno(number) => vec![errno(number)],
        Verdict::Socket => {
            let (alg, vsock) = (libc::AF_ALG as u32, libc::AF_VSOCK as u32);
            vec![load(FIRST_ARGUMENT), jump(JEQ, alg, 2, 0), jump(JEQ, vsock, 1, 0), ALLOW, refuse]
        }
        Verdict::Personality => {
            let mut code = vec![load(FIRST_ARGUMENT)];
            for allowed in [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
                code.extend([jump(JEQ, allowed, 0, 1), ALLOW]);
            }
            code.push(refuse);
            code
        }
        Verdict::CloneFlags => vec![load(FIRST_ARGUMENT), jump(JSET, NEW_NAMESPACES, 0, 1), refuse, ALLOW],
    }
}

// Offsets in `struct seccomp_data`. The lower half of an argument comes first: all of `native()` is little-endian.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

const JEQ: u32 = libc::BPF_JEQ;
const JGE: u32 = libc::BPF_JGE;
const JSET: u32 = libc::BPF_JSET;
const ALLOW: sock_filter = instruction(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW);

const fn instruction(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

const fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

const fn errno(number: i32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | number as u32)
}

const fn jump(test: u32, k: u32, when_true: u8, when_false: u8) -> sock_filter {
    let plain = instruction(libc::BPF_JMP | test | libc::BPF_K, k);
    sock_filter { jt: when_true, jf: when_false, ..plain }
}

/// `body` where the test holds, else past it. A body too long for the eight bits of a test is jumped over in two steps.
fn branch(test: u32, k: u32, body: &[sock_filter]) -> Vec<sock_filter> {
    let mut code = match u8::try_from(body.len()) {
        Ok(length) => vec![jump(test, k, 0, length)],
        Err(_) => {
            let over = instruction(libc::BPF_JMP | libc::BPF_JA, body.len() as u32);
            vec![jump(test, k, 1, 0), over]
        }
    };
    code.extend_from_slice(body);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would.
    fn run(program: &[sock_filter], arch: u32, number: u32, argument: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let code = u32::from(code);
            match code & 7 {
                libc::BPF_LD => {
                    accumulator = match k {
                        NUMBER_OFFSET => number,
                        ARCH_OFFSET => arch,
                        FIRST_ARGUMENT => argument,
                        other => panic!("loads from {other}"),
                    }
                }
                libc::BPF_RET => return k,
                _ if code & 0xf0 == libc::BPF_JA => at += k as usize,
                _ => {
                    let holds = match code & 0xf0 {
                        JEQ => accumulator == k,
                        JGE => accumulator >= k,
                        _ => accumulator & k != 0,
                    };
                    at += usize::from(if holds { jt } else { jf });
                }
            }
        }
    }

    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    const BOTH: &[(u32, Abi)] = &[(AUDIT_X86_64, Abi::X86_64), (AUDIT_X86, Abi::X86)];
    const ARMS: &[(u32, Abi)] = &[(AUDIT_ARM64, Abi::Generic), (AUDIT_ARM, Abi::Arm)];

    #[test]
    fn the_verdicts_of_docker_s_profile() {
        let filter = compile(capability::DEFAULT, BOTH);
        let check = |number, argument, expect| {
            assert_eq!(run(&filter, AUDIT_X86_64, number, argument), expect, "call {number} with {argument:#x}");
        };
        check(0, 0, ALLOWED); // read
        check(59, 0, ALLOWED); // execve
        check(161, 0, ALLOWED); // chroot: SYS_CHROOT is a default capability
        check(165, 0, EPERM); // mount
        check(272, 0, EPERM); // unshare
        check(321, 0, EPERM); // bpf
        check(425, 0, EPERM); // io_uring_setup
        check(435, 0, ENOSYS); // clone3
        check(56, libc::SIGCHLD as u32, ALLOWED); // clone
        check(56, libc::CLONE_NEWUSER as u32, EPERM);
        check(41, libc::AF_INET as u32, ALLOWED); // socket
        check(41, libc::AF_ALG as u32, EPERM);
        check(41, libc::AF_VSOCK as u32, EPERM);
        check(135, 0xffff_ffff, ALLOWED); // personality
        check(135, 0x0040_0000, EPERM);
        check(9999, 0, ENOSYS);
        check(0x4000_0000, 0, ENOSYS); // x32
    }

    #[test]
    fn thirty_two_bit_calls_have_their_own_numbers() {
        let filter = compile(capability::DEFAULT, BOTH);
        assert_eq!(run(&filter, AUDIT_X86, 3, 0), ALLOWED); // read
        assert_eq!(run(&filter, AUDIT_X86, 21, 0), EPERM); // mount
        assert_eq!(run(&filter, AUDIT_ARM64, 63, 0), EPERM, "a foreign architecture");
        let filter = compile(capability::DEFAULT, ARMS);
        assert_eq!(run(&filter, AUDIT_ARM64, 63, 0), ALLOWED); // read
        assert_eq!(run(&filter, AUDIT_ARM64, 40, 0), EPERM); // mount
        assert_eq!(run(&filter, AUDIT_ARM, 0x000f_0005, 0), ALLOWED); // set_tls
    }

    #[test]
    fn capabilities_open_their_calls() {
        let filter = compile(capability::DEFAULT | capability::SYS_ADMIN, BOTH);
        for number in [165, 272, 321, 435] {
            assert_eq!(run(&filter, AUDIT_X86_64, number, 0), ALLOWED, "call {number}");
        }
        assert_eq!(run(&filter, AUDIT_X86_64, 56, libc::CLONE_NEWUSER as u32), ALLOWED);
    }

    #[test]
    fn every_number_of_the_table_is_found_by_the_search() {
        for (architectures, audit, abi) in
            [(BOTH, AUDIT_X86_64, Abi::X86_64), (BOTH, AUDIT_X86, Abi::X86), (ARMS, AUDIT_ARM, Abi::Arm)]
        {
            let filter = compile(capability::DEFAULT, architectures);
            assert!(filter.len() < 4096, "the kernel's limit");
            for (name, rule, numbers) in SYSCALLS.iter().filter(|row| row.2[abi as usize] != NONE) {
                let found = run(&filter, audit, numbers[abi as usize] as u32, 0);
                match verdict(*rule, capability::DEFAULT) {
                    Verdict::Errno(number) => assert_eq!(found, libc::SECCOMP_RET_ERRNO | number as u32, "{name}"),
                    _ => assert_eq!(found, ALLOWED, "{name}"),
                }
            }
        }
    }
}
