//! The event loop.

use std::cmp::Reverse;

use rand::seq::IndexedRandom;

use super::guest::Step;
use super::{BALANCE_EVERY, Doing, Event, SAMPLE_EVERY, Simulator};
use crate::policy::{Alpha, Order};
use crate::scheduler::{CpuId, TaskId, VmId};

impl Simulator {
    pub(super) fn at(&mut self, time: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time, self.sequence, event)));
    }

    pub(super) fn step(&mut self, limit: u64) -> bool {
        match self.events.peek() {
            Some(Reverse((time, ..))) if *time <= limit => {}
            _ => return false,
        }
        let Some(Reverse((time, _, event))) = self.events.pop() else { return false };
        self.now = time;
        self.handled += 1;
        match event {
            Event::Timer(cpu, armed) if self.cpus[cpu as usize].armed == armed => self.timer(cpu),
            Event::Timer(..) => {}
            Event::Interrupt(cpu) => self.decide(cpu),
            Event::Wake(task) => self.wake(TaskId(task)),
            Event::Balance(cpu) => {
                self.at(time + BALANCE_EVERY, Event::Balance(cpu));
                if self.scheduler.balance(CpuId(cpu)).is_some()
                    && self.cpus[cpu as usize].running.is_none()
                {
                    self.decide(cpu);
                }
            }
            Event::Sample => self.sample(),
        }
        true
    }

    fn sample(&mut self) {
        self.at(self.now + SAMPLE_EVERY, Event::Sample);
        for vm in 0..self.left.len() {
            if self.left[vm] > 0 {
                self.samples.taken += 1;
                self.samples.stacked += u64::from(self.scheduler.is_stacked(VmId(vm as u32)));
            }
        }
        for cpu in 0..self.cpus.len() {
            if let Some(far) = self.scheduler.exceeds(CpuId(cpu as u32), Alpha::THESIS) {
                self.samples.compared += 1;
                self.samples.exceeded += u64::from(far);
            }
        }
    }

    fn wake(&mut self, task: TaskId) {
        let waker = self.waker(task);
        let v = &mut self.vcpus[task.0 as usize];
        if matches!(v.doing, Doing::Sleep | Doing::Halt) {
            v.doing = Doing::Ready;
        }
        v.woken = true;
        let Some(cpu) = self.scheduler.target(task, waker) else { return };
        self.account(cpu.0);
        if self.scheduler.wake_on(task, cpu).preempts {
            self.decide(cpu.0);
        }
    }

    /// From where a vCPU that halted is woken: the pCPU of a sibling that runs, whichever.
    fn waker(&mut self, task: TaskId) -> Option<CpuId> {
        let v = &self.vcpus[task.0 as usize];
        let vm = v.vm.filter(|_| v.doing == Doing::Halt)?;
        let running = |t: &&TaskId| self.runs_on(**t).is_some();
        let siblings = self.scheduler.vcpus(vm).iter();
        let running: Vec<TaskId> = siblings.filter(running).copied().collect();
        let chosen = running.choose(&mut self.chance).copied()?;
        self.scheduler.cpu_of(chosen)
    }

    /// Accounts for what `cpu` did until now.
    fn account(&mut self, cpu: u32) {
        if self.record.is_some() {
            self.note(cpu, self.cpus[cpu as usize].since);
        }
        let c = &mut self.cpus[cpu as usize];
        let elapsed = self.now.saturating_sub(c.since);
        c.since = c.since.max(self.now);
        let Some(task) = c.running else {
            c.idle += elapsed;
            return;
        };
        if elapsed == 0 {
            return;
        }
        self.scheduler.charge(CpuId(cpu), elapsed);
        let v = &mut self.vcpus[task.0 as usize];
        let lost = v.overhead.min(elapsed);
        v.overhead -= lost;
        let slow = v.cold.min((elapsed - lost).div_ceil(2));
        v.cold -= slow;
        match &mut v.doing {
            Doing::Compute(left) | Doing::Hold(_, left) => {
                *left -= (elapsed - lost - slow).min(*left);
            }
            Doing::SpinLock(..)
            | Doing::SpinBarrier(..)
            | Doing::SpinPut(_)
            | Doing::SpinGet(_)
            | Doing::SpinAnswers(_) => {
                v.spun += elapsed;
                self.scheduler.spun(task, elapsed);
            }
            Doing::Ready | Doing::Sleep | Doing::Halt | Doing::Ended => {}
        }
    }

    fn timer(&mut self, cpu: u32) {
        self.account(cpu);
        if self.now >= self.cpus[cpu as usize].slice_end || self.leaves_its_loop(cpu) {
            self.decide(cpu);
        } else {
            self.go_on(cpu);
        }
    }

    /// Asks the scheduler who runs on `cpu` from now on.
    fn decide(&mut self, cpu: u32) {
        self.account(cpu);
        if let Some(task) = self.cpus[cpu as usize].running {
            self.vcpus[task.0 as usize].left = Some((cpu, self.now));
        }
        let mut pick = self.scheduler.pick(CpuId(cpu));
        if pick.is_none() && self.scheduler.balance(CpuId(cpu)).is_some() {
            pick = self.scheduler.pick(CpuId(cpu));
        }
        let wait = if self.scheduler.take_ordered() { self.order(cpu) } else { 0 };
        let cpus = self.cpus.len();
        let c = &mut self.cpus[cpu as usize];
        let begins = self.now.max(c.since);
        c.running = pick.map(|p| p.task);
        if let Some(p) = pick {
            let v = &mut self.vcpus[p.task.0 as usize];
            let far = self.scheduler.starts_far(p.task, Alpha::THESIS).filter(|_| p.switched);
            self.samples.started += u64::from(far.is_some());
            self.samples.started_far += u64::from(far == Some(true));
            let mut start = begins + wait;
            c.switching += wait;
            if p.switched {
                start += self.costs.switch;
                c.switching += self.costs.switch;
                let away = match v.left {
                    Some((there, since)) if there == cpu => self.now - since,
                    _ => self.costs.refill,
                };
                v.cold = (v.cold + away).min(self.costs.refill);
                v.loops.scheduled(self.costs.spin_window);
            } else {
                v.loops.went_on();
            }
            v.woken = false;
            c.since = start;
            let exact = self.scheduler.policy.order == Order::Eevdf;
            let end = start + p.slice;
            c.slice_end = if exact { end } else { self.costs.turn_end(end, cpu, cpus) };
        }
        if self.record.is_some() {
            self.note_switch(cpu, begins, self.cpus[cpu as usize].since);
            self.note_loan(cpu);
        }
        for other in self.scheduler.kicks() {
            self.at(self.now + self.costs.interrupt, Event::Interrupt(other.0));
        }
        self.go_on(cpu);
    }

    /// Lets what runs on `cpu` take its next steps, and arms the timer for the one that lasts.
    fn go_on(&mut self, cpu: u32) {
        while let Some(task) = self.cpus[cpu as usize].running {
            // While the pCPU switches, nothing is executed yet.
            if self.cpus[cpu as usize].since > self.now {
                break;
            }
            self.answer(task);
            match self.advance(cpu, task) {
                Progress::Next => {}
                Progress::Lasts => break,
                Progress::Left => return self.decide(cpu),
            }
        }
        self.arm(cpu);
    }

    /// Sets the timer of `cpu` to when something happens there next.
    fn arm(&mut self, cpu: u32) {
        let told = self.told_at(cpu);
        let c = &mut self.cpus[cpu as usize];
        c.told_at = told;
        c.armed += 1;
        let (armed, start) = (c.armed, c.since.max(self.now));
        let Some(task) = c.running else { return };
        let v = &self.vcpus[task.0 as usize];
        let next = match v.doing {
            _ if start > self.now && !v.asked_by.is_empty() => start,
            Doing::Compute(left) | Doing::Hold(_, left) => {
                c.slice_end.min(start + v.overhead + left + left.min(v.cold))
            }
            _ if start > self.now => start,
            _ => c.slice_end.min(told),
        };
        self.at(next, Event::Timer(cpu, armed));
    }

    /// Has those of `spinners` that run look again at what they wait for, now.
    fn stir(&mut self, spinners: &[TaskId]) {
        for task in spinners {
            if let Some(cpu) = self.runs_on(*task) {
                let c = &mut self.cpus[cpu as usize];
                c.armed += 1;
                let armed = c.armed;
                self.at(self.now, Event::Timer(cpu, armed));
            }
        }
    }

    /// The pCPU that executes `task` at this moment.
    pub(super) fn runs_on(&self, task: TaskId) -> Option<u32> {
        let cpu = self.scheduler.cpu_of(task)?.0;
        let c = &self.cpus[cpu as usize];
        (c.running == Some(task) && c.since <= self.now).then_some(cpu)
    }

    /// One step of a vCPU that runs.
    fn advance(&mut self, cpu: u32, task: TaskId) -> Progress {
        let i = task.0 as usize;
        let done = match self.vcpus[i].doing {
            Doing::Ready | Doing::Compute(0) => {
                let step = self.vcpus[i].program.next(&mut self.chance);
                return self.begin(cpu, task, step);
            }
            Doing::Hold(lock, 0) => {
                self.release(lock);
                true
            }
            Doing::SpinLock(lock, hold) => {
                let l = &mut self.locks[lock];
                if l.holder.is_none() {
                    l.holder = Some(task);
                    l.spinners.retain(|t| *t != task);
                    self.vcpus[i].doing = Doing::Hold(lock, hold);
                }
                false
            }
            Doing::SpinBarrier(barrier, generation) => {
                self.barriers[barrier].generation > generation
            }
            Doing::SpinPut(fifo) => self.try_fifo(fifo, task, true),
            Doing::SpinGet(fifo) => self.try_fifo(fifo, task, false),
            Doing::SpinAnswers(left) => left == 0,
            Doing::Compute(_) | Doing::Hold(..) => false,
            Doing::Sleep | Doing::Halt | Doing::Ended => false,
        };
        if done {
            self.vcpus[i].doing = Doing::Ready;
            Progress::Next
        } else {
            Progress::Lasts
        }
    }

    fn begin(&mut self, cpu: u32, task: TaskId, step: Step) -> Progress {
        let i = task.0 as usize;
        // What computes or holds does so for a nanosecond at least, so that time goes on.
        self.vcpus[i].doing = match step {
            Step::Compute(ns) => Doing::Compute(ns.max(1)),
            Step::Critical(lock, ns) => {
                let l = &mut self.locks[lock.0];
                if l.holder.is_none() {
                    l.holder = Some(task);
                    Doing::Hold(lock.0, ns.max(1))
                } else {
                    l.spinners.push(task);
                    Doing::SpinLock(lock.0, ns.max(1))
                }
            }
            Step::Barrier(barrier) => {
                let b = &mut self.barriers[barrier.0];
                b.come += 1;
                if b.come == b.joins {
                    b.come = 0;
                    b.generation += 1;
                    let spinners = std::mem::take(&mut b.spinners);
                    self.stir(&spinners);
                    Doing::Ready
                } else {
                    b.spinners.push(task);
                    Doing::SpinBarrier(barrier.0, b.generation)
                }
            }
            Step::Put(fifo) => Doing::SpinPut(fifo.0),
            Step::Get(fifo) => Doing::SpinGet(fifo.0),
            Step::Shootdown => Doing::SpinAnswers(self.ask_siblings(task)),
            Step::Sleep(ns) | Step::Halt(ns) => {
                self.at(self.now + ns.max(1), Event::Wake(task.0));
                let halts = matches!(step, Step::Halt(_));
                self.vcpus[i].doing = if halts { Doing::Halt } else { Doing::Sleep };
                self.scheduler.sleep(CpuId(cpu));
                return Progress::Left;
            }
            Step::Exit => {
                self.vcpus[i].doing = Doing::Ended;
                self.scheduler.exit(task);
                if let Some(vm) = self.vcpus[i].vm.map(|v| v.0 as usize) {
                    self.left[vm] -= 1;
                    if self.left[vm] == 0 {
                        self.ended[vm] = Some(self.now);
                    }
                }
                return Progress::Left;
            }
        };
        match self.vcpus[i].doing {
            Doing::Compute(_) | Doing::Hold(..) => Progress::Lasts,
            Doing::SpinLock(..) | Doing::SpinBarrier(..) => Progress::Lasts,
            _ => Progress::Next,
        }
    }

    /// The holder lets go: the spinner that runs and came first has the lock now.
    fn release(&mut self, lock: usize) {
        let spinners = &self.locks[lock].spinners;
        let next = spinners.iter().position(|t| self.runs_on(*t).is_some());
        let Some(at) = next else {
            self.locks[lock].holder = None;
            return;
        };
        let task = self.locks[lock].spinners.remove(at);
        self.locks[lock].holder = Some(task);
        if let Some(cpu) = self.runs_on(task) {
            self.account(cpu);
            if let Doing::SpinLock(_, hold) = self.vcpus[task.0 as usize].doing {
                self.vcpus[task.0 as usize].doing = Doing::Hold(lock, hold);
            }
            self.arm(cpu);
        }
    }

    /// Interrupts the siblings of `task`; how many of them are yet to answer. What executes now
    /// answers at once (its interrupt costs the asker what [`Costs::interrupt`] says), what
    /// waits for a pCPU when it gets one, what sleeps has nothing to forget.
    fn ask_siblings(&mut self, task: TaskId) -> usize {
        let Some(vm) = self.vcpus[task.0 as usize].vm else { return 0 };
        self.vcpus[task.0 as usize].overhead += self.costs.interrupt;
        let mut left = 0;
        for i in 0..self.scheduler.vcpus(vm).len() {
            let sibling = self.scheduler.vcpus(vm)[i];
            let waits = self.scheduler.is_runnable(sibling) && self.runs_on(sibling).is_none();
            if sibling != task && waits {
                self.vcpus[sibling.0 as usize].asked_by.push(task);
                left += 1;
            }
        }
        left
    }

    /// `task` executes: it answers who interrupted it.
    fn answer(&mut self, task: TaskId) {
        for asker in std::mem::take(&mut self.vcpus[task.0 as usize].asked_by) {
            if let Doing::SpinAnswers(left) = &mut self.vcpus[asker.0 as usize].doing {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    self.stir(&[asker]);
                }
            }
        }
    }

    fn try_fifo(&mut self, fifo: usize, task: TaskId, put: bool) -> bool {
        let f = &mut self.fifos[fifo];
        let can = if put { f.holds < f.capacity } else { f.holds > 0 };
        if can {
            f.holds = if put { f.holds + 1 } else { f.holds - 1 };
            f.spinners.retain(|t| *t != task);
            let waiting = f.spinners.clone();
            self.stir(&waiting);
        } else if !f.spinners.contains(&task) {
            f.spinners.push(task);
        }
        can
    }
}

/// What a step came to.
enum Progress {
    /// It is done; the next follows.
    Next,
    /// It takes time.
    Lasts,
    /// The vCPU gave its pCPU up.
    Left,
}
