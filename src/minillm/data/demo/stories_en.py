"""English plots: one sentence (or a few that belong together) a line, `?` before a line that may be left out.

Slots: x and y are people (y older or a friend), o and o2 things, p and q places, pet the animal of x, f and g wild
animals, hide a hiding place, food, skill, count items, n and m numbers.
"""

# ruff: noqa: E501 (a template reads best on one line)

OPENINGS = """\
[Once upon a time|Long ago|Once|Not so long ago] there [was|lived] a {x.child_word} [called|named|whose name was] {x}.
{x} was a [cheerful|quiet|curious|friendly|lively|thoughtful|kind] {x.child_word} who [lived|had {x.his} home] near {home}.
One [sunny|cool|bright|quiet|fresh] [morning|afternoon|day], {x} [got up early|had nothing to do|finished {x.his} breakfast|looked out of the window].
It was a [cold|warm|grey|windy|lovely] [morning|afternoon] [in spring|in autumn|in May|in October|at the end of winter].
{x}, who was {x.age} years old, lived near {home} with {x.his} [family|parents|grandmother|uncle].
[On Saturday|On Sunday|On Monday|On Friday|Last Tuesday], {x} [woke up|got out of bed] [early|late|full of plans|in a good mood].
Everybody near {home} knew {x}, [the {x.child_word} who was always busy|because {x.he} greeted everyone|a {x.child_word} of {x.age}].
"""

PLOTS = {
    "lost": """\
{x} [had|owned] {o.a}, and {x.he} [loved it more than anything|took it everywhere|never went out without it].
[It had been a present from {x.his} grandmother.|It was made of {o.material}, and {x.he} [kept it clean|was proud of it].|{x.His} friend {y} had given it to {x.him}.]
[That morning|That day|After lunch], {x.he} [walked|went|ran] to {p} and [stayed there for an hour|looked at everything|met a few people there]. [Then|After that|Later] {x.he} [went on|walked on] to {q}.
[There|When {x.he} got there|A little later] {x.he} [noticed|saw|found out] that the {o.noun} was [gone|missing|no longer with {x.him}].
?{x.He} [looked in every pocket|searched the ground|felt tears come to {x.his} eyes|did not know what to do].
"[What is the matter|Why do you look so sad|What happened], {x}?" asked {y}. "I have lost my {o.noun}," [said {x}|{x} answered|{x} sighed].
"[Think back|Let us think|Stay calm]," said {y}. "[Where did you have it last|Where were you before this]?" [{x} thought for a moment|{x} closed {x.his} eyes and thought]. "{p.At}!" {x.he} [said|cried].
[They went back together|The two of them hurried back to {p}|Together they ran back to {p}] and [looked everywhere|searched carefully|asked everybody]. [At last|After a while|In the end], {y} [found|saw|spotted] the {o.noun} {hide}.
"[Thank you|Thank you so much|How can I thank you], {y}!" [said {x}|cried {x}]. [From then on|After that day|From that day on], {x} [always looked twice before leaving|took better care of the {o.noun}|never forgot the {o.noun} again].
""",
    "birthday": """\
[Tomorrow|The next day|In three days] it [was going to be|would be] the birthday of {x.his} friend {y}. {x} [wanted to give|hoped to find|was looking for] a [good|special|beautiful] present.
"[What does {y} like|What would {y} be glad about]?" {x} asked [{x.his} mother|{x.his} father|a neighbour]. "[I know|I remember] that {y.he} [likes everything that is|is very fond of the colour] {o.colour}," was the answer.
[So|That is why] {x} took the {n} coins [{x.he} had saved|from {x.his} drawer] and [went|walked] to {p}.
?[On the way|In the street] {x.he} [met an old man who needed help|stopped to look at a bird|counted the money twice].
[There {x.he} saw|In a corner {x.he} found|On a small table lay] {o.a}[ made of {o.material}|]. It cost {m} coins. {x} [paid|gave the money to the seller] and had {left} coins [left|in {x.his} pocket].
?At home {x.he} [wrapped it in paper|tied a ribbon around it|wrote a card for {y}].
When {y} [opened the present|saw the {o.noun}], {y.he} [smiled from ear to ear|jumped for joy|could hardly speak]. "[It is {o.colour}|A {o.noun}]! [How did you know|That is just what I wished for]?"
"[I asked|I thought about you|A friend listens]," said {x}. [They spent the whole day together.|They ate cake until evening.|It was the best birthday of all.]
""",
    "rain": """\
{x} [wanted to go|was on {x.his} way|set out] to {p} [to buy {food}|to meet {x.his} friend {y}|with {o.a} under {x.his} arm].
[The sky was dark|Grey clouds were gathering|The wind was getting stronger], but {x} [did not notice|did not mind|thought nothing of it].
[Halfway there|After ten minutes|Near {q}], it began to rain [hard|heavily|in big drops]. [{x} had no umbrella.|{x.His} umbrella was at home.]
[{x} stood under a tree and waited|{x} began to run|Soon {x.he} was wet from head to foot]. [Then|Just then] {y} came along with a [big|wide|large] umbrella.
"[Come under|There is room for two|Share it with me]," said {y}. [Together they walked|They went on side by side] to {p}, and [both stayed dry|they talked all the way].
[A week later|Some days later|The following week], {y} [was carrying a heavy basket|had to mend a fence|could not open a gate] [{q.at}|near {q}]. {x} [saw it and came running|stopped at once|did not wait to be asked].
"[You shared your umbrella with me|You helped me in the rain]," {x} said, "[so now I will help you|and now it is my turn]." [The work was soon done.|Together it was easy.]
""",
    "pet": """\
{x} had a {pet.kind} called {pet.name}. [Every day|Every morning] {x.he} [gave it fresh water|fed it|played with it], and [the two were good friends|it followed {x.him} everywhere].
[One evening|That afternoon|One day], [somebody left the gate open|the door was not closed|a loud noise frightened the animal], and {pet.name} ran away.
{x} [looked in the kitchen|called and called|searched the whole house], but [there was no answer|the {pet.kind} was nowhere to be seen].
[{x.He} asked {y}|Then {x.he} met {y} and asked {y.him}]: "Have you seen my {pet.kind}?" "[Yes|I think so]," [said|answered] {y}. "[It was running towards {p}|I saw something small near {p}]."
[They hurried to {p}.|Quickly they went to {p}.] [It was getting dark, so {y} brought a lamp.|They walked slowly and listened.] 
[Then|Suddenly] they heard a [soft|small|strange] sound {hide}. [It was {pet.name}!|There sat {pet.name}, cold and hungry.]
{x} [took {pet.name} in {x.his} arms|held out a little food] and [carried it home|brought it back home]. [Since then, {x} closes the gate every evening.|That night {pet.name} slept beside {x.his} bed.|"You must never do that again," {x} [said|whispered].]
""",
    "truth": """\
{x} was [visiting|staying with] {y} that day. On the [table|shelf|windowsill] stood {o.a}[ made of {o.material}|], and {y} was very [proud|fond] of it.
"[Please be careful with it|You may look at it, but do not touch it]," said {y} and went [into the kitchen|to {p}|out to the yard].
But {x} [could not resist|was too curious|wanted to see it from below]. {x.He} [picked it up|took it in {x.his} hands], [and it slipped|and then {x.he} stumbled], and the {o.noun} fell on the floor and broke.
[{x.His} heart beat fast.|{x} turned pale.] "[I could say that the wind did it|Perhaps nobody will notice]," {x.he} thought. [But that would be a lie.|But that did not feel right.]
When {y} [came back|returned], {x} [told the truth|said at once what had happened]. "[I broke your {o.noun}|It was my fault], and I am [very|so] sorry."
{y} was [silent for a moment|sad at first]. [Then|But then] {y.he} [said|smiled and said]: "[A thing can be mended|A {o.noun} is only a thing]. [I am glad that you were honest|What counts is that you told me the truth]."
[They mended it together with glue.|{x} helped to mend it the same evening.] [You could still see a small crack, but {y} liked it even better than before.|After that, {y} trusted {x} more than ever.]
""",
    "learn": """\
More than anything, {x} wanted to learn to {skill}. [All {x.his} friends could do it.|It looked so easy when others did it.]
[The first time {x.he} tried|At {x.his} first try], [everything went wrong|it did not work at all|people laughed]. "[I will never learn it|It is too hard for me]," {x} [said|sighed].
{y} heard it and [sat down beside {x.him}|shook {y.his} head]. "[I needed {n} weeks before I could do it|Nobody can do it on the first day]. [Come to my house tomorrow|Come to me tomorrow|Visit me on Saturday], and I will show you how."
[So they met|They met as they had agreed|When the day came, they began]. {y} [explained every step|showed it slowly], and {x} [did it after {y.him}|listened and tried again]. [The first day was hard, the second a little easier.|After an hour {x.he} was tired, but {x.he} did not give up.]
{x} practised every day for {m} days. [On the last day|Then, one morning], [it worked|everything went well]. "[I can do it|Look at me]!" {x.he} [cried|shouted].
"[I knew you could|You did not give up, that is the secret]," said {y}. [Now {x} teaches others who want to {skill}.|And {x} was [proud|happy] all day long.]
""",
    "share": """\
{x.His} grandmother gave {x} {n} {items}. [{x} was very pleased.|"[Enjoy them|They are for you]," she said.]
[On the way|Going home], {x.he} [met|saw] {y} [{p.at}|near {p}]. {y} [looked hungry and sad|was sitting there alone|had none at all].
"[What shall I do? If I give some away, I have fewer|If I share, I have fewer myself]," thought {x}. [But then {x.he} remembered how {y} had helped {x.him} with {x.his} {o.noun}.|But it is no fun to have good things alone.]
So {x} gave {y} {m} of them and kept {left}. {y} [thanked {x.him} warmly|was so glad that {y.he} laughed]. [Together they sat down and talked.|They sat in the sun until evening.]
[The next day|Later that week], {y} came to {x} with {o2.a}. "[This is for you|I made it for you]," {y.he} said, "[because you shared with me|because you are a good friend]."
""",
    "race": """\
{x} and {y} both wanted to [win the great race|be first in the race] from {p} to {q}. The prize was {o.a}.
[{y} was faster|Everybody said that {y} would win], but {x} [had practised every day|knew the way very well].
[At the start|At first] {y} was [far ahead|in front]. [Then|But near the middle], {y} [stumbled over a stone|took the wrong path|stopped to rest in the shade].
{x} [could have run past|was now in front], but {x.he} [stopped|turned around] and [helped {y} up|asked if {y} was hurt|called {y} back to the right path].
[They reached {q} together|Hand in hand they came to the finish], [and so there were two winners|and nobody could say who was first]. [The {o.noun} belongs to both of them now: one week to {x}, one week to {y}.|They shared the prize, and everyone clapped.]
""",
    "plant": """\
{y} gave {x} a [tiny|small|round] seed. "[Put it into the ground|Plant it]," {y.he} said, "[and be patient|and wait and see]."
{x} [filled a pot with earth|dug a little hole in the garden], [put the seed in|laid the seed inside] and gave it water. [Then {x.he} waited.|"[Grow|Grow quickly]!" {x.he} said.]
[After one day nothing had happened.|For {n} days nothing could be seen.] [{x} wanted to dig the seed up again|{x} was disappointed], but {y} said: "[Good things need time|It is working under the ground]."
So {x} watered it every [morning|evening]. After {m} days a [green|thin green] leaf [came out|looked out of the earth]. [Week by week the plant grew.|It grew taller and taller.]
[In summer|At last] it had a big {o.colour} flower. {x} [gave the flower to {y}|showed it to everybody|painted a picture of it]. "[You were right|Now I understand]," {x} said, "[waiting was worth it|patience makes things grow]."
""",
    "fable": """\
[Once|One day|In a dry summer], {a_f} [found|discovered] {a_food} [in the forest|near the old bridge|by the river]. [It was enough for two.|There was a lot of it.]
A hungry {g} came along. "[Will you share with me|May I have a little]?" asked the {g}. "[No|Certainly not]," said the {f}. "[I found it, so it is mine|Find something yourself]."
The {g} [went away sadly|said nothing and left]. [Soon|Not long] after, the {f} [fell into a deep hole and could not get out|was caught in a net and could not move|hurt its foot and could not walk]. "Help!" it cried.
[Many animals passed, but only the {g} stopped.|The {g} heard it and came.] "[I was hungry and you gave me nothing|You sent me away]," said the {g}, "[but I will help you all the same|but nobody should be left alone]."
[It pulled and pushed until the {f} was safe.|It fetched its friends, and together they saved the {f}.] The {f} was ashamed. "[Come|Please come]," it said, "[from today we eat together|half of all I have is yours]."
[So the {f} and the {g} became friends.|And that is how the two became friends.] [Those who share are never alone.|A kind heart does not count.]
""",
    "trade": """\
{x} had {o.a}, but [what {x.he} really wanted was|{x.he} dreamed of having] {o2.a}. {y} had one.
[{x} went to {p} and asked {y}|{x} met {y} {p.at} and asked]: "[Would you trade|Shall we trade]? My {o.noun} for your {o2.noun}?" {y} [looked at the {o.noun} from all sides|thought about it].
"[It is a good {o.noun}|I like it]," said {y}, "but [I would also like {n} {items}|give me {n} {items} as well]." {x} [had {m} {items}|counted {x.his} {items}: there were {m}].
[So {x} gave {y} the {o.noun} and {n} {items}|They shook hands on it], and {x} [still had|kept] {left}. Now {x} had the {o2.name} and {y} had the {o.name}.
[At home|In the evening], {x.he} [put the {o2.noun} on the shelf|looked at the {o2.noun} again and again]. [Both were happy with the trade.|"A good trade makes two people happy," said {x.his} father.]
""",
    "work": """\
{y} was a {y.job} and worked near {p}. [Every day {x} watched {y.him} at work.|{x} liked to visit {y.him} after school.]
One [morning|day], {y} was ill and [could not work|had to stay in bed]. "[Who will do my work|Who will help me now]?" {y.he} asked. "[I will|Let me try]," said {x}.
{x} [went there early|put on the apron of {y}|opened the door] and [did what {x.he} had seen so often|began to work]. [It was not easy|It took a long time], [but people were patient|but {x.he} did not stop], and by [noon|evening] {x.he} had [earned|been paid] {n} coins.
[{x.He} brought all the money to {y}|In the evening {x} put the {n} coins on the table]. "[You are a true friend|How well you have done]," said {y} and gave {x.him} {m} of them. So {y} kept {left}.
[When {y} was well again|The next week], the two [worked side by side|opened the door together]. [{x} now knew what {x.he} wanted to be one day: a {y.job}.|And {x} learned a lot.]
""",
}
ENDINGS = """\
[That night {x} slept well.|And {x} fell asleep with a smile.|{x} told the story at home, and everyone listened.]
[It had been a good day.|What a day it had been!|{x} would remember this day for a long time.]
"""
